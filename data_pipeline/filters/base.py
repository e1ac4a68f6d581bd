"""What a filter is: a name, a version, and a pure function from a batch of candidates to score columns."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from data_pipeline.decoding.images import Decoded, UndecodableImage
from data_pipeline.records.schema import Record


@dataclass(frozen=True)
class Candidate:
    """A record on its way through the cascade: decoded once, shared by all filters.

    Attributes:
      record: as it is stored.
      decoded: its image; None: this one or a condition image does not decode.
      failure: why it does not.
      conditions: of an edit, its decoded condition images.
    """

    record: Record
    decoded: Decoded | None
    failure: UndecodableImage | None
    conditions: tuple[Decoded, ...] = ()

    @property
    def whole(self) -> Decoded:
        """The decoded image, for filters that are not asked about broken ones."""
        assert self.decoded is not None
        return self.decoded

    @property
    def images(self) -> tuple[Image.Image, ...]:
        """The image and all condition images, upright."""
        return tuple(decoded.image for decoded in (self.whole, *self.conditions))


@dataclass(frozen=True)
class Filter:
    """A rule or model that scores images. A score is never a deletion: thresholds are applied by `selection`.

    Attributes:
      name: prefix of its columns, as in `resolution.width`.
      version: raised whenever the same image would get another score; then, and only then, it is computed again.
      columns: {name: (type, meaning)} of every column it gives: int, float, bool, str or, for what is said of captions,
        lists of these in the order of the captions; None when there is none.
      score: candidates -> one dict of these columns per candidate, in order. Pure, and importable by name.
      sees_broken: whether it is asked about images that do not decode; otherwise their columns are None.
      model: digest of the weights behind the scores; other weights, other scores.
      optional: its model may be absent (`model` None). Then it scores nothing, and selection says so.
      needs: what to do to have its model.
      on_device: its model runs in JAX: one process asks it, which owns the accelerator.
    """

    name: str
    version: int
    columns: dict[str, tuple[Any, str]]
    score: Callable[[Sequence[Candidate]], list[dict]]
    sees_broken: bool = False
    model: str | None = None
    optional: bool = False
    needs: str = ""
    on_device: bool = False

    @property
    def can_score(self) -> bool:
        return not self.optional or self.model is not None


def within(grey: Image.Image, side: int) -> Image.Image:
    """A grey picture, averaged down to at most `side` pixels wide and high; a smaller one stays as it is."""
    factor = side / max(grey.size)
    if factor >= 1:
        return grey
    width, height = (max(1, round(length * factor)) for length in grey.size)
    return grey.resize((width, height), Image.Resampling.BOX)
