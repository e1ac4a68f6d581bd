"""Arithmetic of a training step of the transformer, by formula.

A product of [m, k] and [k, n] counts 2 m k n; everything else (norms, softmax, rotations, optimizer) is left out, as
usual when model FLOPs utilisation is stated. Padding slots count, because they are computed.

With width D, hidden width F, L layers, S slots and P visible pairs of query and key per image, one pass forward takes

    blocks     2 L S (4 D^2 + 3 D F)      queries, keys, values, output; up, gate, down
    attention  4 L D P                    scores and weighted values
    ends       2 (slots times in x out) of the input, text, output, time and modulation layers

P is the sum of `visible_until`: S^2 if bidirectional, less if block-causal. It is neither halved nor rounded up to the
blocks of a kernel.
"""

import dataclasses

from qi2_jax.models.mmdit import TIME_FEATURES, MMDiTConfig
from qi2_jax.sequence import Layout


@dataclasses.dataclass(frozen=True)
class Flops:
    """Operations of one pass forward over a global batch."""

    blocks: float
    attention: float
    ends: float

    @property
    def model(self) -> float:
        """Forward and backward pass without any repetition: what utilisation is stated of."""
        return 3 * (self.blocks + self.attention + self.ends)

    def executed(self, remat: bool) -> float:
        """What a step computes.

        The backward pass of attention computes the scores again: 5 products against 2 forward. `remat` repeats the
        forward pass of the blocks.
        """
        return (3 + remat) * self.blocks + (1 + 2.5 + remat) * self.attention + 3 * self.ends


def flops_per_step(config: MMDiTConfig, layout: Layout, batch: int) -> Flops:
    """Operations of one step over `batch` images."""
    D, S, C = config.width, layout.length, config.latent_channels
    pairs = int(layout.visible_until(config.attention).sum(dtype=int))
    image_slots = layout.target + sum(layout.conditions)
    ends = C * D * (image_slots + layout.target) + (config.text_width * D + D**2) * sum(layout.text)
    ends += TIME_FEATURES * D + D**2 + 5 * D**2
    return Flops(
        blocks=2.0 * batch * config.layers * S * (4 + 3 * config.mlp_ratio) * D**2,
        attention=4.0 * batch * config.layers * D * pairs,
        ends=2.0 * batch * ends,
    )
