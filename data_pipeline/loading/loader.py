"""The loader: batches as a pure function of (seed, step), the same global batches on any number of hosts.

Dims: `B` rows asked for, `S` joint sequence, `N` target slots, `M` condition slots, `T` text slots, `C` latent
channels, `E` width of text features.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import grain
import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from data_pipeline.samples.schema import Sample, Text
from qi2_jax import sequence


class Row(NamedTuple):
    """A sample and the one text that a step reads with it; `dropped`: that text is the empty prompt."""

    sample: Sample
    text: Text
    dropped: bool = False


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows padded to a layout, as host arrays; `conditions_BMC` is None without condition images.

    Samples whose features have no width have `prompts`, and `pictures` of their condition images, for each row;
    those with pixels instead of latents also `targets`, and their latents have no channels.

    `composition` says what the batch is made of, in shares 0..1: `padding` (slots of the joint sequence that hold
    nothing), `padding_text` (the same of its text slots), `dropped` (rows with the empty prompt), `wide` and `tall`
    (targets with more columns than rows, and with fewer).
    """

    latents_BNC: Float[np.ndarray, "B N C"]
    text_BTE: Float[np.ndarray, "B T E"]
    positions_BS3: Int[np.ndarray, "B S 3"]
    valid_BS: Bool[np.ndarray, "B S"]
    conditions_BMC: Float[np.ndarray, "B M C"] | None
    composition: dict[str, float]
    prompts: tuple[str, ...] | None = None
    pictures: tuple[tuple[UInt8[np.ndarray, "H W c"], ...], ...] = ()
    targets: tuple[UInt8[np.ndarray, "H W c"], ...] = ()


def collate(layout: sequence.Layout, rows: Sequence[Row]) -> Rows:
    """Pads rows to a layout.

    Raises:
      ValueError: if a sample does not fit.
    """
    first = rows[0]
    text = np.zeros((len(rows), sum(layout.text), first.text.features.shape[-1]), first.text.features.dtype)
    positions, valid = np.zeros((len(rows), layout.length, 3), np.int32), np.zeros((len(rows), layout.length), bool)
    for place, (sample, own, _) in enumerate(rows):
        grids = [image.shape[:2] for image in sample.conditions]
        positions[place], valid[place] = sequence.place(layout, own.lengths, sample.latents.shape[:2], grids)
        text[place, layout.text_slots(own.lengths)] = own.features
    sizes = np.array([row.sample.latents.shape[:2] for row in rows])
    composition = {
        "padding": 1 - float(valid.mean()),
        "padding_text": 1 - sum(sum(row.text.lengths) for row in rows) / max(1, len(rows) * sum(layout.text)),
        "dropped": float(np.mean([row.dropped for row in rows])),
        "wide": float(np.mean(sizes[:, 1] > sizes[:, 0])),
        "tall": float(np.mean(sizes[:, 1] < sizes[:, 0])),
    }
    prompts = None if text.shape[-1] else tuple(row.text.prompt for row in rows if row.text.prompt is not None)
    pictures = tuple(row.sample.pictures for row in rows)
    targets = tuple(row.sample.target for row in rows if row.sample.target is not None)
    latents, conditions = place_latents(layout, [(row.sample.latents, *row.sample.conditions) for row in rows])
    return Rows(latents, text, positions, valid, conditions, composition, prompts, pictures, targets)


def place_latents(
    layout: sequence.Layout, rows: Sequence[Sequence[Float[np.ndarray, "h w C"]]]
) -> tuple[Float[np.ndarray, "B N C"], Float[np.ndarray, "B M C"] | None]:
    """Latents of rows in the slots of a layout: of the targets, and of the condition images, None without any.

    Args:
      rows: of each the latents of its target and of its condition images, in order.
    """
    C = rows[0][0].shape[-1]
    starts = np.cumsum([0, *layout.conditions])
    latents = np.zeros((len(rows), layout.target, C), np.float32)
    conditions = np.zeros((len(rows), starts[-1], C), np.float32)
    for place, (target, *others) in enumerate(rows):
        _fill(latents[place], 0, target)
        for start, image in zip(starts, others, strict=False):
            _fill(conditions[place], start, image)
    return latents, conditions if layout.conditions else None


def _fill(slots: np.ndarray, start: int, image: np.ndarray) -> None:
    tokens = image.shape[0] * image.shape[1]
    slots[start : start + tokens] = image.reshape(tokens, image.shape[-1])


@dataclasses.dataclass(frozen=True)
class Loader:
    """Shuffled, endless, padded batches of one stream.

    Every epoch is a new permutation of all samples; batches run across its border, so no sample is left out. Of several
    texts each step draws one. With probability `dropout` the text is the empty prompt: that of the sample, which for an
    edit stands beside its condition images, or the common one.

    Attributes:
      samples: by index.
      empty: the empty prompt without condition images.
      layout: what batches are padded to.
      batch_size: global number of samples per step.
      seed: of order, texts and dropout.
      dropout: probability in [0, 1].
      rows: which rows of the global batch to make, those of this process; None: all.

    Raises:
      ValueError: for a probability that is none.
    """

    samples: Sequence[Sample]
    empty: Text
    layout: sequence.Layout
    batch_size: int
    seed: int
    dropout: float = 0.0
    rows: Sequence[int] | None = None

    def __post_init__(self):
        if not 0 <= self.dropout <= 1:
            raise ValueError(f"dropout is {self.dropout}; it is a probability")

    def order(self) -> grain.MapDataset:
        """Which sample stands at each place of the endless sequence; memory does not grow with their number."""
        return grain.MapDataset.range(len(self.samples)).seed(self.seed).shuffle().repeat()

    def batches(self) -> grain.MapDataset:
        """The batch of every step, by its number."""
        # Texts and dropout are drawn from the sample's place in the global order, whatever the number of hosts.
        chosen = self.order().random_map(self._choose, seed=self.seed + 1)
        rows = range(self.batch_size) if self.rows is None else self.rows

        def batch(step: int) -> Rows:
            return collate(self.layout, [chosen[step * self.batch_size + row] for row in rows])

        return grain.MapDataset.range(np.iinfo(np.int64).max).map(batch)

    def _choose(self, index: int, rng: np.random.Generator) -> Row:
        sample = self.samples[index]
        text = sample.texts[rng.integers(len(sample.texts))]
        if rng.random() < self.dropout:
            return Row(sample, sample.empty or self.empty, dropped=True)
        return Row(sample, text)
