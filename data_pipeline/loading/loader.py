"""The loader: batches as a pure function of (seed, step), the same global batches on any number of hosts."""

import concurrent.futures
import dataclasses
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import grain
import numpy as np
from jaxtyping import Bool, Int

from data_pipeline.loading.batch import Batch, collate, with_text
from data_pipeline.loading.text_slots import TextSlots, smallest
from data_pipeline.samples.lengths import TextLengths
from data_pipeline.samples.schema import Sample, Text
from qi2_jax.sequence import Layout
from qi2_jax.training.mean import Mean
from qi2_jax.training.microbatch import PADDING, Microbatch, Stats


class Drawn(NamedTuple):
    """What the rows of a window's microbatches show.

    Attributes:
      samples: index of each sample.
      texts: which of its texts it takes.
      dropped: whether the empty prompt replaces the text.
      layouts: layout of each microbatch.
    """

    samples: Int[np.ndarray, "microbatches rows"]
    texts: Int[np.ndarray, "microbatches rows"]
    dropped: Bool[np.ndarray, "microbatches rows"]
    layouts: Sequence[Layout]


@dataclasses.dataclass(frozen=True)
class Loader:
    """Shuffled, endless, padded microbatches of one stream.

    Every epoch is a new permutation of all samples. Batches may span two epochs, so no sample is left out. A step draws
    one of the texts of each sample. With probability `dropout` it uses the empty prompt instead: for an edit the
    sample's own, which includes the condition images, otherwise the common one. Then the samples of a window of batches
    are sorted by the lengths of their texts, see `TextSlots`.

    Attributes:
      samples: samples of the stream.
      lengths: text lengths of the samples.
      empty: empty prompt without condition images.
      layouts: layouts that microbatches are padded to, from the fewest text slots to the most; the last one has room
        for every sample.
      size: global number of samples of a microbatch.
      seed: seed of the order, texts and dropout.
      dropout: probability in [0, 1].
      rows: rows of a global microbatch that this process reads; None for all.
      labels: constant metrics of the stream, logged with every microbatch.
      slots: how batches are formed by the lengths of texts.
      microbatches: number of microbatches in a batch.

    Raises:
      ValueError: if `dropout` is not a probability, or the parts of a batch would not be equal.
    """

    samples: Sequence[Sample]
    lengths: TextLengths
    empty: Text
    layouts: Sequence[Layout]
    size: int
    seed: int
    dropout: float = 0.0
    rows: Sequence[int] | None = None
    labels: Mapping[str, float] = dataclasses.field(default_factory=dict)
    slots: TextSlots = TextSlots()  # noqa: RUF009
    microbatches: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.dropout <= 1:
            raise ValueError(f"dropout is {self.dropout}; it must be between 0 and 1")
        if self.size * self.microbatches % self.slots.pieces:
            raise ValueError(
                f"a batch of {self.size * self.microbatches} samples cannot be cut into {self.slots.pieces} pieces; "
                "change text_slots.pieces"
            )

    @property
    def layout(self) -> Layout:
        """The layout that has room for every sample."""
        return self.layouts[-1]

    @property
    def window(self) -> int:
        """Batches that are sorted together: fewer than configured if an epoch has fewer."""
        return max(1, min(self.slots.window, len(self.samples) // (self.size * self.microbatches)))

    def order(self) -> grain.MapDataset:
        """Indices of the samples in the order of the endless sequence. Memory does not grow with their number."""
        return grain.MapDataset.range(len(self.samples)).seed(self.seed).shuffle().repeat()

    def batches(self) -> grain.MapDataset:
        """Every microbatch, with the rows of this process. Batch `b` has those from `b * microbatches` on."""
        windows = _Windows(self.draw)
        rows = list(range(self.size) if self.rows is None else self.rows)

        def microbatch(number: int) -> Microbatch:
            which, place = divmod(number, self.window * self.microbatches)
            drawn = windows[which]
            dropped = drawn.dropped[place, rows].tolist()
            chosen = zip(drawn.samples[place, rows].tolist(), drawn.texts[place, rows].tolist(), dropped, strict=True)
            return self._microbatch(drawn.layouts[place], [self._read(*one) for one in chosen], dropped)

        return grain.MapDataset.range(np.iinfo(np.int64).max).map(microbatch)

    def example(self, layout: Layout) -> Microbatch:
        """A microbatch with the shapes of a layout, which the empty prompt fits whatever its text slots."""
        rows = range(self.size) if self.rows is None else self.rows
        samples = [self._read(row % len(self.samples), 0, True) for row in rows]
        return self._microbatch(layout, samples, [True] * len(samples))

    def draw(self, window: int) -> Drawn:
        """What the microbatches of a window show. It reads no samples, and all processes draw the same."""
        batches, count = self.window, self.window * self.microbatches * self.size
        order, rng = self.order(), np.random.default_rng((self.seed, 1, window))
        samples = np.array([order[place] for place in range(window * count, (window + 1) * count)])
        texts = (rng.random(count) * self.lengths.choices(samples)).astype(np.int64)
        dropped = rng.random(count) < self.dropout
        tokens = self.lengths.drawn(samples, texts, dropped, self.empty.lengths)
        of_batches = np.arange(count).reshape(batches, -1)
        if len(self.layouts) > 1:  # otherwise, sorting would save nothing
            pieces = np.argsort(tokens[:, -1], kind="stable").reshape(batches * self.slots.pieces, -1)
            of_batches = rng.permutation(pieces).reshape(batches, -1)
            by_length = np.argsort(tokens[of_batches, -1], axis=1, kind="stable")
            of_batches = np.take_along_axis(of_batches, by_length, axis=1)
        places = of_batches.reshape(batches * self.microbatches, self.size)
        layouts = [smallest(self.layouts, tokens[rows]) for rows in places]
        return Drawn(samples[places], texts[places], dropped[places], layouts)

    def _read(self, index: int, text: int, is_dropped: bool) -> Sample:
        """A sample with the text that was drawn."""
        sample = self.samples[index]
        return with_text(sample, (sample.empty or self.empty) if is_dropped else sample.texts[text])

    def _microbatch(self, layout: Layout, samples: Sequence[Sample], is_dropped: Sequence[bool]) -> Microbatch:
        batch = collate(layout, samples)
        stats = Stats(self.size, self.size * layout.length, metrics=self._metrics(layout, batch, samples, is_dropped))
        return Microbatch(layout, batch, stats=stats)

    def _metrics(
        self, layout: Layout, batch: Batch, samples: Sequence[Sample], is_dropped: Sequence[bool]
    ) -> dict[str, float | Mean]:
        """The composition of the batch, as shares 0..1.

        `padding` is the share of empty slots in the joint sequence and `padding_text` in its text slots. Each is a mean
        over all slots of an interval, as batches differ in length. `dropped` is the share of rows with the empty
        prompt; `wide` and `tall` are the shares of targets with more columns than rows, and with fewer.
        """
        sizes = np.array([sample.latents.shape[:2] for sample in samples])
        text_slots = sum(layout.text)
        text_tokens = sum(sum(sample.texts[0].lengths) for sample in samples)
        padding = 1 - float(batch.cond.valid_BS.mean())
        padding_text = 1 - text_tokens / max(1, len(samples) * text_slots)
        slots, text_slots = self.size * layout.length, self.size * text_slots
        return {
            "batch/dropped": float(np.mean(is_dropped)),
            "batch/wide": float(np.mean(sizes[:, 1] > sizes[:, 0])),
            "batch/tall": float(np.mean(sizes[:, 1] < sizes[:, 0])),
            **self.labels,
            PADDING: Mean(slots * padding, slots),
            "batch/padding_text": Mean(text_slots * padding_text, text_slots),
        }


class _Windows:
    """The windows that are read: each is drawn once, whatever the number of readers, and the next one ahead of time.

    A window of half a million samples takes seconds to draw, and the threads that read ahead all want it at once.
    """

    def __init__(self, draw: Callable[[int], Drawn]):
        self._draw, self._lock = draw, threading.Lock()
        self._drawn: dict[int, concurrent.futures.Future[Drawn]] = {}
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "windows")

    def __getitem__(self, window: int) -> Drawn:
        with self._lock:
            for number in (window, window + 1):
                if number not in self._drawn:
                    self._drawn[number] = self._thread.submit(self._draw, number)
            # Readers that are behind may still want the window before.
            self._drawn = {number: one for number, one in self._drawn.items() if window - 1 <= number}
            drawn = self._drawn[window]
        return drawn.result()
