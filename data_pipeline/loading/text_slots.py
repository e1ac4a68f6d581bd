"""How many text slots batches have: few layouts for a stream, and batches of samples with similar lengths.

Every row of a batch is padded to the batch's layout, and every layout is a compiled program. With one layout, captions
of 160 tokens on average are padded to the longest of 1,064, and at 256p two thirds of the arithmetic is for padding.

Dims: `d` drawn texts, `G` text segments.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from data_pipeline.samples.lengths import TextLengths
from qi2_jax.config.fields import check_at_least
from qi2_jax.sequence import Layout

MULTIPLE = 16  # slots of a layout's last text segment are a multiple of this, or the stream's largest number
MIN_GAIN = 0.006  # share of a stream's slots that a layout must save, as it is one more program to compile
MAX_MEASURED = 1_000_000  # samples whose lengths decide about the layouts


@dataclass(frozen=True)
class TextSlots:
    """How batches of a stream are formed by the lengths of their texts.

    The batches of a window take the same samples as without it, in the order of their lengths. Which of them form which
    batch does not depend on the number of devices, hosts or microbatches.

    Attributes:
      layouts: largest number of layouts of a stream, each with its own number of text slots; 1: all rows are padded to
        the longest text.
      window: batches of a stream whose samples are sorted together; 1: each batch by itself.
      pieces: parts of a batch. The sorted samples of a window are cut into `window` x `pieces` parts, and each batch
        takes `pieces` of them at random. With 1, all texts of a batch have about one length. A larger number mixes
        lengths within a batch; it wastes slots if a batch has fewer microbatches than pieces.

    Raises:
      ValueError: for a number below 1.
    """

    layouts: int = 1
    window: int = 1
    pieces: int = 1

    def __post_init__(self) -> None:
        check_at_least(self, layouts=1, window=1, pieces=1)


def choose_layouts(
    largest: Layout,
    lengths: TextLengths,
    empty: tuple[int, ...],
    dropout: float,
    most: int,
    min_gain: float = MIN_GAIN,
) -> tuple[Layout, ...]:
    """The layouts of a stream, from the fewest to the most slots of the last text segment; the last one is `largest`.

    They minimise the mean number of slots if every text had a batch of its own length. Each layout saves at least
    `min_gain`. Other segments have little but the template around the condition images, and keep their largest sizes.

    Args:
      largest: layout that has room for every sample.
      lengths: text lengths of the samples.
      empty: tokens of the common empty prompt; all layouts have room for it.
      dropout: probability of the empty prompt.
      most: largest number of layouts.
      min_gain: share of the stream's slots that each layout must save.
    """
    end = largest.text[-1]
    slots, share = _distribution(lengths, empty, dropout)
    slots = np.minimum(-(-np.maximum(slots, 1) // MULTIPLE) * MULTIPLE, end)
    values, place = np.unique(np.append(slots, end), return_inverse=True)
    shares = np.bincount(place, weights=np.append(share, 0.0))
    around = largest.length - end
    ends = _partition(shares, (around + values).astype(np.float64), most, min_gain)
    return tuple(Layout((*largest.text[:-1], int(values[place])), largest.target, largest.conditions) for place in ends)


def _distribution(
    lengths: TextLengths, empty: tuple[int, ...], dropout: float
) -> tuple[Int[np.ndarray, " d"], Float[np.ndarray, " d"]]:
    """Lengths of the last segment, and how often each is drawn."""
    count = len(lengths.texts)
    samples = np.linspace(0, count - 1, min(count, MAX_MEASURED)).astype(np.int64)
    choices = lengths.choices(samples)
    drawn = np.repeat(samples, choices)
    texts = np.arange(len(drawn)) - np.repeat(np.cumsum(choices) - choices, choices)
    kept = lengths.drawn(drawn, texts, np.zeros(len(drawn), bool), empty)[:, -1]
    dropped = lengths.drawn(samples, np.zeros_like(samples), np.ones(len(samples), bool), empty)[:, -1]
    # All empty prompts fit every layout, even where dropout never takes them.
    last = lengths.tokens[lengths.first + lengths.texts - 1, -1] if lengths.has_conditions else np.array(empty[-1:])
    slots = np.maximum(np.concatenate([kept, dropped]), last.max())
    share = np.concatenate([np.repeat((1 - dropout) / choices, choices), np.full(len(samples), dropout)])
    return slots, share / len(samples)


def _partition(
    shares: Float[np.ndarray, " v"], costs: Float[np.ndarray, " v"], most: int, min_gain: float
) -> list[int]:
    """Ends of the parts that minimise the sum of each value's share times the cost at the end of its part.

    There are as few parts as save at least `min_gain` each, and at most `most`.
    """
    count, total = len(costs), np.concatenate([[0.0], np.cumsum(shares)])
    best = np.concatenate([[0.0], np.full(count, np.inf)])
    ends: list[list[int]] = [[] for _ in range(count + 1)]
    chosen, before = [count - 1], np.inf
    for _ in range(min(most, count)):
        following, extended = np.full(count + 1, np.inf), ends.copy()
        for end in range(1, count + 1):
            sums = best[:end] + (total[end] - total[:end]) * costs[end - 1]
            start = int(np.argmin(sums))
            following[end], extended[end] = sums[start], [*ends[start], end - 1]
        best, ends = following, extended
        if best[count] > (1 - min_gain) * before:
            break
        chosen, before = ends[count], best[count]
    return chosen


def smallest(layouts: Sequence[Layout], tokens: Int[np.ndarray, "d G"]) -> Layout:
    """The smallest of a stream's layouts in which all these texts fit."""
    last = tokens[:, -1].max()
    return next(layout for layout in layouts if layout.text[-1] >= last)
