"""The loader: batches as a pure function of (seed, step), the same global batches on any number of hosts."""

import dataclasses
from collections.abc import Mapping, Sequence

import grain
import numpy as np

from data_pipeline.loading.batch import Batch, collate, with_text
from data_pipeline.samples.schema import Sample, Text
from qi2_jax import sequence
from qi2_jax.training.mean import Mean
from qi2_jax.training.microbatch import Microbatch, Stats


@dataclasses.dataclass(frozen=True)
class Loader:
    """Shuffled, endless, padded batches of one stream.

    Every epoch is a new permutation of all samples. Batches may span two epochs, so no sample is left out. A step draws
    one of the texts of each sample. With probability `dropout` it uses the empty prompt instead: for an edit the
    sample's own, which includes the condition images, otherwise the common one.

    Attributes:
      samples: samples of the stream.
      empty: empty prompt without condition images.
      layout: layout that batches are padded to.
      batch_size: global number of samples per batch.
      seed: seed of the order, texts and dropout.
      dropout: probability in [0, 1].
      rows: rows of the global batch that this process reads; None for all.
      labels: constant metrics of the stream, logged with every batch.

    Raises:
      ValueError: if `dropout` is not a probability.
    """

    samples: Sequence[Sample]
    empty: Text
    layout: sequence.Layout
    batch_size: int
    seed: int
    dropout: float = 0.0
    rows: Sequence[int] | None = None
    labels: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 <= self.dropout <= 1:
            raise ValueError(f"dropout is {self.dropout}; it must be between 0 and 1")

    def order(self) -> grain.MapDataset:
        """Indices of the samples in the order of the endless sequence. Memory does not grow with their number."""
        return grain.MapDataset.range(len(self.samples)).seed(self.seed).shuffle().repeat()

    def batches(self) -> grain.MapDataset:
        """The batch of every step, as a `Microbatch` of this process's rows."""
        # Texts and dropout depend on the sample's place in the global order, whatever the number of hosts.
        chosen = self.order().random_map(self._choose, seed=self.seed + 1)
        rows = range(self.batch_size) if self.rows is None else self.rows

        def batch(step: int) -> Microbatch:
            drawn = [chosen[step * self.batch_size + row] for row in rows]
            samples = [sample for sample, _ in drawn]
            batch = collate(self.layout, samples)
            metrics = self._metrics(batch, samples, [uses_empty_prompt for _, uses_empty_prompt in drawn])
            stats = Stats(self.batch_size, self.batch_size * self.layout.length, metrics=metrics)
            return Microbatch(self.layout, batch, stats=stats)

        return grain.MapDataset.range(np.iinfo(np.int64).max).map(batch)

    def _choose(self, index: int, rng: np.random.Generator) -> tuple[Sample, bool]:
        """The sample with one text, and whether this text is the empty prompt."""
        sample = self.samples[index]
        text = sample.texts[rng.integers(len(sample.texts))]
        if rng.random() < self.dropout:
            return with_text(sample, sample.empty or self.empty), True
        return with_text(sample, text), False

    def _metrics(
        self, batch: Batch, samples: Sequence[Sample], uses_empty_prompt: Sequence[bool]
    ) -> dict[str, float | Mean]:
        """The composition of the batch, as shares 0..1.

        `padding` is the share of empty slots in the joint sequence and `padding_text` in its text slots. Each is a mean
        over all slots of an interval, as batches differ in length. `dropped` is the share of rows with the empty
        prompt; `wide` and `tall` are the shares of targets with more columns than rows, and with fewer.
        """
        sizes = np.array([sample.latents.shape[:2] for sample in samples])
        text_slots = sum(self.layout.text)
        text_tokens = sum(sum(sample.texts[0].lengths) for sample in samples)
        padding = 1 - float(batch.cond.valid_BS.mean())
        padding_text = 1 - text_tokens / max(1, len(samples) * text_slots)
        slots, text_slots = self.batch_size * self.layout.length, self.batch_size * text_slots
        return {
            "batch/dropped": float(np.mean(uses_empty_prompt)),
            "batch/wide": float(np.mean(sizes[:, 1] > sizes[:, 0])),
            "batch/tall": float(np.mean(sizes[:, 1] < sizes[:, 0])),
            **self.labels,
            "batch/padding": Mean(slots * padding, slots),
            "batch/padding_text": Mean(text_slots * padding_text, text_slots),
        }
