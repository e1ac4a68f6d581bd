"""How the six stages run on each generation of chips: the mesh, how much is computed at once, and what is kept.

`qi2 plan STAGE:FORM --topology T` compiles the programs of a choice, and `--search` finds one. docs/planning.md says
which of these choices were compiled. Weights and state are sharded over all chips of a slice, so that there is memory
for what the backward pass keeps. On v6e and v5p, SparseCores move weights and gradients while the matrix units compute.
v5e has none, and the sums of gradients are not overlapped there.
"""

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Choice:
    """How a stage runs.

    Attributes:
      data, fsdp, tensor: devices along each mesh axis.
      images: images that the chips of one shard of a batch compute at once, by side, see `images_per_device`. About
        2,000 slots on a v6e chip take as long to compute as the weights of a block to gather.
      slots: largest number of slots of one shard of a batch (the chips along `tensor` share it) in a microbatch, see
        `slots_per_device`.
      activations_gib: memory of a chip for activations; with less of it, more is computed again.
      blocks: see `blocks_per_step`. Without SparseCores, a gather hides only behind products of the same step.
    """

    data: int
    fsdp: int
    tensor: int
    images: Mapping[int, int]
    slots: int
    activations_gib: float
    blocks: int = 1


_V6E, _V5P = {256: 16, 512: 4, 1024: 1}, {256: 16, 512: 4, 1024: 2}
# By form and largest side. "" is four slices of 256 v6e chips, "v5p" one slice of 8x8x4, "v5e" four slices of 16x16.
CHOICES = {
    "": {
        256: Choice(4, 256, 1, _V6E, 22_000, 28.0),
        1024: Choice(4, 256, 1, _V6E, 12_000, 28.0),
        2048: Choice(4, 64, 4, {512: 16, 1024: 4, 2048: 1}, 36_000, 28.0),
    },
    "v5p": {
        1024: Choice(1, 256, 1, _V5P, 22_000, 80.0),
        2048: Choice(1, 128, 2, {512: 8, 1024: 4, 2048: 1}, 36_000, 80.0),
    },
    "v5e": {512: Choice(4, 256, 1, {256: 8, 512: 4}, 11_000, 12.0, blocks=2)},
}


def choice_for(form: str, side: int) -> Choice:
    """The choice for a stage.

    Args:
      form: a key of `CHOICES`.
      side: largest side of the stage.

    Raises:
      ValueError: if nothing was chosen for these chips at that size.
    """
    fitting = [largest for largest in CHOICES[form] if side <= largest]
    if not fitting:
        raise ValueError(
            f"no choice for {form or 'v6e'} chips at {side}p, only up to {max(CHOICES[form])}p; find one with `qi2 "
            "plan --search`, and add it to experiments/qwen_image_2/chips.py"
        )
    return CHOICES[form][min(fitting)]
