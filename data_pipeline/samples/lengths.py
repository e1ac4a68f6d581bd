"""The text lengths of a stream's samples, which decide how many slots its batches need.

    DIR/256-0/unit-00000.lengths    safetensors beside the samples of a unit: `texts` [n] and `tokens` [L, G]

They take about 16 bytes per sample in memory, so that batches can be formed before any sample is read.

Dims: `n` samples, `L` texts of all samples, `G` text segments.
"""

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int

from data_pipeline.samples.schema import Sample, decode_arrays, encode_arrays
from qi2_jax.runtime.atomic import write_atomic

SUFFIX = ".lengths"


@dataclass(frozen=True)
class TextLengths:
    """The tokens of every text of a sequence of samples, in order.

    Attributes:
      texts: number of texts of each sample; the empty prompt of an edit is the last of them.
      tokens: tokens of each text's segments, sample by sample.
    """

    texts: Int[np.ndarray, " n"]
    tokens: Int[np.ndarray, "L G"]

    @classmethod
    def of(cls, samples: Iterable[Sample]) -> "TextLengths":
        """Raises a ValueError if there are no samples."""
        rows = [[text.lengths for text in sample.all_texts] for sample in samples]
        if not rows:
            raise ValueError("there are no samples whose texts could be measured")
        return cls(np.array([len(row) for row in rows], np.int32), np.concatenate(rows).astype(np.int32))

    @classmethod
    def join(cls, parts: Iterable["TextLengths"]) -> "TextLengths":
        parts = list(parts)
        return cls(np.concatenate([part.texts for part in parts]), np.concatenate([part.tokens for part in parts]))

    @functools.cached_property
    def first(self) -> Int[np.ndarray, " n"]:
        """Position of each sample's first text in `tokens`."""
        return np.cumsum(self.texts) - self.texts

    @property
    def has_conditions(self) -> bool:
        """Whether the samples are edits, which have an empty prompt of their own."""
        return self.tokens.shape[1] > 1

    def choices(self, samples: Int[np.ndarray, " d"]) -> Int[np.ndarray, " d"]:
        """Number of texts of some samples that training draws from."""
        return self.texts[samples] - self.has_conditions

    def drawn(
        self,
        samples: Int[np.ndarray, " d"],
        texts: Int[np.ndarray, " d"],
        dropped: Bool[np.ndarray, " d"],
        empty: tuple[int, ...],
    ) -> Int[np.ndarray, "d G"]:
        """Tokens of drawn texts.

        Args:
          samples: drawn samples.
          texts: number of the text of each.
          dropped: whether the empty prompt replaces it.
          empty: tokens of the common empty prompt, which samples without condition images take.
        """
        if self.has_conditions:
            return self.tokens[self.first[samples] + np.where(dropped, self.texts[samples] - 1, texts)]
        return np.where(dropped[:, None], np.asarray(empty, np.int32), self.tokens[self.first[samples] + texts])


def write(path: Path, lengths: TextLengths) -> None:
    """Writes the lengths of a unit beside its samples, at `path` with `SUFFIX`."""
    write_atomic(path.with_suffix(SUFFIX), encode_arrays({"texts": lengths.texts, "tokens": lengths.tokens}))


def read(path: Path) -> TextLengths | None:
    """The lengths that `write` stored for a file of samples; None if there are none.

    Raises:
      ValueError: if they are damaged.
    """
    path = path.with_suffix(SUFFIX)
    if not path.is_file():
        return None
    try:
        arrays = decode_arrays(path.read_bytes())
        lengths = TextLengths(arrays["texts"].astype(np.int32), arrays["tokens"].astype(np.int32))
        if lengths.texts.min() < 1 or lengths.texts.sum() != len(lengths.tokens) or lengths.tokens.min() < 0:
            raise ValueError("its numbers contradict each other")
        return lengths
    except (ValueError, KeyError, IndexError) as error:
        raise ValueError(f"{path}: {error}; delete it, and it is measured again") from None
