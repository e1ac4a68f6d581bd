"""The loader: batches as a pure function of (seed, step), the same global batches on any number of hosts.

Dims: `B` rows asked for, `S` joint sequence, `N` target slots, `M` condition slots, `T` text slots, `C` latent
channels, `E` width of text features.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import grain
import numpy as np
from jaxtyping import Bool, Float, Int

from data_pipeline.samples import Sample, Text
from qi2_jax import sequence


@dataclasses.dataclass(frozen=True)
class Rows:
    """Samples padded to a layout, as host arrays; `conditions_BMC` is None without condition images."""

    latents_BNC: Float[np.ndarray, "B N C"]
    text_BTE: Float[np.ndarray, "B T E"]
    positions_BS3: Int[np.ndarray, "B S 3"]
    valid_BS: Bool[np.ndarray, "B S"]
    conditions_BMC: Float[np.ndarray, "B M C"] | None


def collate(layout: sequence.Layout, samples: Sequence[Sample]) -> Rows:
    """Pads samples to a layout.

    Raises:
      ValueError: if a sample does not fit.
    """
    placed = [
        sequence.place(
            layout,
            sample.text.lengths,
            sample.latents.shape[:2],
            [condition.shape[:2] for condition in sample.conditions],
        )
        for sample in samples
    ]

    def flatten(latents, slots):
        tokens = latents.reshape(-1, latents.shape[-1])
        return np.pad(tokens, ((0, slots - len(tokens)), (0, 0)))

    def text(text: Text):
        parts = np.split(text.features, np.cumsum(text.lengths)[:-1])
        return np.concatenate(
            [np.pad(part, ((0, slots - len(part)), (0, 0))) for part, slots in zip(parts, layout.text, strict=True)]
        )

    def conditions(sample: Sample):
        return np.concatenate([flatten(*pair) for pair in zip(sample.conditions, layout.conditions, strict=True)])

    return Rows(
        np.stack([flatten(sample.latents, layout.target) for sample in samples]),
        np.stack([text(sample.text) for sample in samples]),
        np.stack([positions for positions, _ in placed]),
        np.stack([valid for _, valid in placed]),
        np.stack([conditions(sample) for sample in samples]) if layout.conditions else None,
    )


@dataclasses.dataclass(frozen=True)
class Loader:
    """Shuffled, endless, padded batches.

    Every epoch is a new permutation of all samples; batches run across its border, so no sample is left out. With
    probability `dropout` a sample's text becomes the empty prompt.

    Attributes:
      samples: by index.
      empty: features of the empty prompt.
      layout: what batches are padded to.
      batch_size: global number of samples per step.
      seed: of order and dropout.
      dropout: probability in [0, 1].
      rows: which rows of the global batch to make, those of this process; None: all.
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

    def batches(self) -> grain.MapDataset:
        """The batch of every step, by its number."""
        order = grain.MapDataset.range(len(self.samples)).seed(self.seed).shuffle().repeat()
        # Dropout draws from the sample's place in the global order, so it does not depend on the number of hosts.
        chosen = order.random_map(self._choose, seed=self.seed + 1)
        rows = range(self.batch_size) if self.rows is None else self.rows

        def batch(step: int) -> Rows:
            return collate(self.layout, [chosen[step * self.batch_size + row] for row in rows])

        return grain.MapDataset.range(np.iinfo(np.int64).max).map(batch)

    def from_step(self, start: int) -> Iterator[Rows]:
        """Batches of steps start, start + 1, ...; reading runs ahead in threads."""
        steps = self.batches()[start:]
        return iter(steps.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)))

    def _choose(self, index: int, rng: np.random.Generator) -> Sample:
        sample = self.samples[index]
        if rng.random() < self.dropout:
            if sample.conditions:
                raise ValueError(
                    "dropout of text beside condition images needs an empty prompt with their placeholders"
                )
            return dataclasses.replace(sample, text=self.empty)
        return sample
