"""FLOPs of a training step of the transformer, by formula.

A product of [m, k] and [k, n] counts as 2 m k n. Norms, softmax, rotations and the optimizer are not counted, as is
usual for model FLOPs utilisation. Padding slots are counted, because they are computed.

With width D, hidden width F, L layers, S slots and P visible pairs of query and key per image, one forward pass takes

    blocks     2 L S (4 D^2 + 3 D F)      queries, keys, values, output; up, gate, down
    attention  4 L D P                    scores and weighted values
    ends       2 (slots x in x out) summed over the input, text, output, time and modulation layers

P is the sum of `visible_until`: S^2 for bidirectional attention, less for block-causal attention. It is neither halved
nor rounded up to the blocks of a kernel.

The backward pass of a layer computes the gradients of its input and of its weights, each with as many operations as the
forward pass. With an adapter (LoRA) of rank r, the frozen layers have no gradients of weights, and each adapted layer
of m inputs and n outputs adds 2 r (m + n) per slot to the forward pass. Attention has no weights, so its cost does
not change.
"""

import dataclasses
import functools

import jax

from qi2_jax.models import lora
from qi2_jax.models.lora import LoRAConfig
from qi2_jax.models.mmdit import TIME_FEATURES, MMDiT, MMDiTConfig
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

    def executed(self, remat: bool) -> float:
        """Operations that a step executes.

        The backward pass of attention recomputes the scores: 5 products against 2 in the forward pass. `remat` repeats
        the forward pass of the blocks.
        """
        attention = (1 + 2.5 + remat) * self.attention
        return (self._passes + remat) * self.blocks + attention + self._passes * self.ends + (3 + remat) * self.adapter


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
    D, S, C = config.width, layout.length, config.latent_channels
    pairs = int(layout.visible_until(config.attention).sum(dtype=int))
    image_slots = layout.target + sum(layout.conditions)
    ends = C * D * (image_slots + layout.target) + (config.text_width * D + D**2) * sum(layout.text)
    ends += TIME_FEATURES * D + D**2 + 5 * D**2
    return Flops(
        blocks=2.0 * batch * config.layers * S * (4 + 3 * config.mlp_ratio) * D**2,
        attention=4.0 * batch * config.layers * D * pairs,
        ends=2.0 * batch * ends,
        adapter=0.0 if adapter is None else 2.0 * batch * _adapter(config, layout, adapter),
    )


def _adapter(config: MMDiTConfig, layout: Layout, adapter: LoRAConfig) -> int:
    """Multiplications in an adapter's layers for one image."""
    model = jax.eval_shape(lambda: MMDiT(config, key=jax.random.key(0)))
    slots = {
        "blocks": config.layers * layout.length,
        "image_in": layout.target + sum(layout.conditions),
        "image_out": layout.target,
        "text_in": sum(layout.text),
    }
    linears, total = lora.linears(model), 0
    for path in lora.targets(model, adapter):
        *_, out_dim, in_dim = linears[path].weight.shape
        total += slots.get(path.split(".")[0], 1) * adapter.rank * (in_dim + out_dim)
    return total
