"""FLOPs of a training step of the transformer, by formula.

A product of [m, k] and [k, n] counts as 2 m k n. Norms, softmax, rotations and the optimizer are not counted, as is
usual for model FLOPs utilisation. `flops_per_step` counts all slots of a layout, because padding is computed too, and
`flops_of_tokens` what samples without padding would take.

With width D, hidden width F, L layers, S slots and P visible pairs of query and key per image, one forward pass takes

    blocks     2 L S (4 D^2 + 3 D F)      queries, keys, values, output; up, gate, down
    attention  4 L D P                    scores and weighted values
    ends       2 (slots x in x out) summed over the input, text, output, time and modulation layers

P is the sum of `visible_until`: S^2 for bidirectional attention, less for block-causal attention. It is neither halved
nor rounded up to the blocks of a kernel.

Dims: `B` batch, `S` joint sequence.

The backward pass of a layer computes the gradients of its input and of its weights, each with as many operations as the
forward pass. With an adapter (LoRA) of rank r, the frozen layers have no gradients of weights, and each adapted layer
of m inputs and n outputs adds 2 r (m + n) per slot to the forward pass. Attention has no weights, so its cost does
not change.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Bool

from qi2_jax.models import lora
from qi2_jax.models.lora import LoRAConfig
from qi2_jax.models.mmdit import TIME_FEATURES, MMDiT, MMDiTConfig
from qi2_jax.models.recomputation import recomputed_products
from qi2_jax.sequence import Layout


@dataclasses.dataclass(frozen=True)
class Flops:
    """Operations of one forward pass over a global batch.

    Attributes:
      blocks: operations of the linear layers of the blocks.
      attention: operations of scores and weighted values.
      ends: operations of the linear layers before and after the blocks.
      adapter: operations of an adapter's factors; above 0, all other layers are frozen.
    """

    blocks: float
    attention: float
    ends: float
    adapter: float = 0.0

    @property
    def _passes(self) -> int:
        """Passes through a layer: forward, gradients of its input and, unless it is frozen, of its weights."""
        return 2 if self.adapter else 3

    @property
    def model(self) -> float:
        """Operations of forward and backward pass without recomputation, as model FLOPs utilisation counts them."""
        return self._passes * (self.blocks + self.ends) + 3 * (self.attention + self.adapter)

    def executed(self, config: MMDiTConfig, keep: str | None = None) -> float:
        """Operations that a step executes.

        The backward pass of attention recomputes the scores: 5 products against 2 in the forward pass. Recomputation
        repeats a part of the forward pass of the blocks. An adapter is taken to be repeated with all of them.

        Args:
          config: architecture of the transformer.
          keep: what the backward pass keeps of each block, see `recomputation`; None: everything.
        """
        blocks, scores = (0.0, 0.0) if keep is None else recomputed_products(keep, config.mlp_ratio)
        attention = (1 + 2.5 + scores) * self.attention
        linear = (self._passes + blocks) * self.blocks + (3 + blocks) * self.adapter
        return linear + attention + self._passes * self.ends


@functools.cache
def flops_per_step(config: MMDiTConfig, layout: Layout, batch: int, adapter: LoRAConfig | None = None) -> Flops:
    """Operations of one forward pass over a batch; see `Flops` for those of a step.

    Args:
      config: architecture of the transformer.
      layout: slots of the sequence.
      batch: number of images.
      adapter: adapter that is trained instead of the whole model; None: the whole model is trained.

    Raises:
      ValueError: if the adapter matches no layer.
    """
    counts = sum(layout.text), sum(layout.conditions), layout.target, int(layout.visible_until(config.attention).sum())
    return _flops(config, _Counts(batch, *(batch * count for count in counts)), adapter)


def flops_of_tokens(
    config: MMDiTConfig, layout: Layout, valid_BS: Bool[np.ndarray, "B S"], adapter: LoRAConfig | None = None
) -> Flops:
    """Operations of one forward pass over the tokens of samples, each as if it were computed without padding.

    Args:
      config: architecture of the transformer.
      layout: slots of the sequence.
      valid_BS: which slots have a token.
      adapter: see `flops_per_step`.
    """

    def tokens(kind: str) -> int:
        return sum(int(valid_BS[:, start:end].sum()) for own, start, end in layout.segments if own == kind)

    visible_BS = np.cumsum(valid_BS, axis=1)[:, layout.visible_until(config.attention) - 1]  # tokens that a slot sees
    pairs = int(visible_BS[valid_BS].sum())
    counts = _Counts(len(valid_BS), tokens("text"), tokens("condition"), tokens("target"), pairs)
    return _flops(config, counts, adapter)


class _Counts(NamedTuple):
    """Images, and their tokens by kind and visible pairs of tokens, summed over the images."""

    images: int
    text: int
    conditions: int
    target: int
    pairs: int


def _flops(config: MMDiTConfig, counts: _Counts, adapter: LoRAConfig | None) -> Flops:
    D, C = config.width, config.latent_channels
    images, text, conditions, target, pairs = counts
    ends = C * D * (conditions + 2 * target) + (config.text_width * D + D**2) * text
    ends += images * (TIME_FEATURES * D + D**2 + 5 * D**2)
    return Flops(
        blocks=2.0 * config.layers * (text + conditions + target) * (4 + 3 * config.mlp_ratio) * D**2,
        attention=4.0 * config.layers * D * pairs,
        ends=2.0 * ends,
        adapter=0.0 if adapter is None else 2.0 * _adapter(config, counts, adapter),
    )


def _adapter(config: MMDiTConfig, counts: _Counts, adapter: LoRAConfig) -> int:
    """Multiplications in an adapter's layers."""
    slots = {
        "blocks": config.layers * (counts.text + counts.conditions + counts.target),
        "image_in": counts.conditions + counts.target,
        "image_out": counts.target,
        "text_in": counts.text,
    }
    return sum(slots.get(part, counts.images) * adapter.rank * widths for part, widths in _adapted(config, adapter))


@functools.cache
def _adapted(config: MMDiTConfig, adapter: LoRAConfig) -> tuple[tuple[str, int], ...]:
    """For each layer with an adapter: the part of the model that it belongs to, and its inputs and outputs together."""
    model = jax.eval_shape(lambda: MMDiT(config, key=jax.random.key(0)))
    linears = lora.linears(model)
    shapes = ((path, linears[path].weight.shape) for path in lora.targets(model, adapter))
    return tuple((path.split(".")[0], shape[-2] + shape[-1]) for path, shape in shapes)
