"""Arithmetic of a training step of the transformer, by formula.

A product of [m, k] and [k, n] counts 2 m k n; everything else (norms, softmax, rotations, optimizer) is left out, as
usual when model FLOPs utilisation is stated. Padding slots count, because they are computed.

With width D, hidden width F, L layers, S slots and P visible pairs of query and key per image, one pass forward takes

    blocks     2 L S (4 D^2 + 3 D F)      queries, keys, values, output; up, gate, down
    attention  4 L D P                    scores and weighted values
    ends       2 (slots times in x out) of the input, text, output, time and modulation layers

P is the sum of `visible_until`: S^2 if bidirectional, less if block-causal. It is neither halved nor rounded up to the
blocks of a kernel.

Of a layer the backward pass takes the gradients of its input and of its weights, each as many operations as forward.
With an adapter (LoRA) of rank r, the frozen layers have no gradients of weights, and each adapted layer of m inputs and
n outputs adds 2 r (m + n) per slot forward. Attention has no weights, and stays what it is.
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
    """Operations of one pass forward over a global batch.

    Attributes:
      adapter: of the adapter's own layers; above 0 all others are frozen.
    """

    blocks: float
    attention: float
    ends: float
    adapter: float = 0.0

    @property
    def _passes(self) -> int:
        """Through layers with weights: forward, gradients of inputs, gradients of weights unless they are frozen."""
        return 2 if self.adapter else 3

    @property
    def model(self) -> float:
        """Forward and backward pass without any repetition: what utilisation is stated of."""
        return self._passes * (self.blocks + self.ends) + 3 * (self.attention + self.adapter)

    def executed(self, remat: bool) -> float:
        """What a step computes.

        The backward pass of attention computes the scores again: 5 products against 2 forward. `remat` repeats the
        forward pass of the blocks.
        """
        attention = (1 + 2.5 + remat) * self.attention
        return (self._passes + remat) * self.blocks + attention + self._passes * self.ends + (3 + remat) * self.adapter


@functools.cache
def flops_per_step(config: MMDiTConfig, layout: Layout, batch: int, adapter: LoRAConfig | None = None) -> Flops:
    """Operations of one step over `batch` images.

    Args:
      adapter: what is trained instead of the whole model.

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
    """Products of an adapter's layers for one image."""
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
