"""Distributions of caption lengths, for plans that are made before there are samples."""

import dataclasses
import re
from typing import Self

import numpy as np

from data_pipeline.samples.lengths import TextLengths

TEMPLATE, AROUND, EMPTY = 40, 32, 41  # tokens: of the template, before a condition image, of the empty prompt


@dataclasses.dataclass(frozen=True)
class Captions:
    """Captions of log-normal length, without template.

    Attributes:
      median: median number of tokens.
      sigma: standard deviation of the logarithm.
      most: longest caption, to which longer ones are cut.

    Raises:
      ValueError: for a number that is not positive.
    """

    median: float = 120.0
    sigma: float = 0.8
    most: int = 1024

    def __post_init__(self) -> None:
        if not (self.median > 0 and self.sigma > 0 and self.most >= 1):
            raise ValueError(f"captions of {self} need positive numbers")

    @classmethod
    def parse(cls, text: str) -> Self:
        """Captions from "MEDIAN:SIGMA:MOST", such as "120:0.8:1024".

        Raises:
          ValueError: for any other text.
        """
        found = re.fullmatch(r"([\d.]+):([\d.]+):(\d+)", text)
        if not found:
            raise ValueError(f"captions {text!r} are not MEDIAN:SIGMA:MOST, such as 120:0.8:1024 (in tokens)")
        return cls(float(found.group(1)), float(found.group(2)), int(found.group(3)))

    def drawn(self, count: int, seed: int = 0) -> list[int]:
        """Numbers of tokens of captions, without template."""
        drawn = np.exp(np.log(self.median) + self.sigma * np.random.default_rng(seed).normal(size=count))
        return np.clip(np.round(drawn), 1, self.most).astype(int).tolist()

    def longest(self, conditions: int) -> tuple[int, ...]:
        """Tokens of each text segment in the longest text of a sample with `conditions` condition images."""
        return (*(AROUND,) * conditions, TEMPLATE + self.most)

    def lengths(self, conditions: int, count: int) -> tuple[TextLengths, tuple[int, ...]]:
        """Text lengths of samples with `conditions` condition images, and the lengths of their empty prompt.

        An edit has a text of its own for the empty prompt, as in the cache.
        """
        rows = np.array([(*(AROUND,) * conditions, TEMPLATE + caption) for caption in self.drawn(count)])
        empty = (*(AROUND,) * conditions, EMPTY)
        texts = np.ones(count, np.int64)
        if conditions:
            texts, rows = texts + 1, np.stack([rows, np.broadcast_to(empty, rows.shape)], 1).reshape(-1, len(empty))
        return TextLengths(texts, rows), empty
