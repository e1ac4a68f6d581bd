"""The definition of a filter: a pure function from records to score columns, and the thresholds of a stage for them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from PIL import Image

from data_pipeline.decoding.images import Decoded, UndecodableImage
from data_pipeline.records.schema import Record

Row = dict[str, Any]  # scores of one record: {"<filter>.<column>": score} of all filters
Chosen = Any  # values of all thresholds, as attributes: `selection.thresholds.Thresholds`


@dataclass(frozen=True)
class Candidate:
    """A record with its decoded images, which all filters share.

    Attributes:
      record: the stored record.
      decoded: its image; None if this image or a condition image does not decode.
      failure: why it does not decode.
      conditions: decoded condition images of an edit.
    """

    record: Record
    decoded: Decoded | None
    failure: UndecodableImage | None
    conditions: tuple[Decoded, ...] = ()

    @property
    def whole(self) -> Decoded:
        """The decoded image, for filters that never see broken ones."""
        assert self.decoded is not None
        return self.decoded

    @property
    def images(self) -> tuple[Image.Image, ...]:
        """The image and all condition images, upright."""
        return tuple(decoded.image for decoded in (self.whole, *self.conditions))


@dataclass(frozen=True)
class Exemption:
    """Records that a threshold does not apply to.

    Attributes:
      meaning: description of these records for the documentation.
      applies: whether a record is exempt.
    """

    meaning: str
    applies: Callable[[Row, Chosen], bool]


@dataclass(frozen=True)
class Threshold:
    """A number or switch of a stage's config, `data.thresholds.<name>`.

    Attributes:
      default: value where a config says nothing.
      meaning: explanation for the documentation.
      low, high: smallest and largest valid value; None for switches and names.
      column: the filter's column that is compared with it and that the report draws; None if there is no single one.
      keeps: side of the threshold on which records stay.
      reason: why records or captions are dropped that fail it. If the filter has no function of its own for that
        (`drops`, `drops_caption`), a comparison with the column decides.
      exempt: records that it does not apply to.
      applies_to: all records, or only image-text pairs or edits.
      values: the scores that the report draws, if they are not simply the column.
      logarithmic: whether the report's histogram is.
      by_group: whether a percentile (`<name>_percentile`) may raise it for groups of records.
    """

    name: str
    default: bool | int | float | str
    meaning: str
    low: float | None = None
    high: float | None = None
    column: str | None = None
    keeps: Literal["above", "below"] = "above"
    reason: str = ""
    exempt: tuple[Exemption, ...] = ()
    applies_to: Literal["all", "pairs", "edits"] = "all"
    values: Callable[[Row, Chosen], list] | None = None
    logarithmic: bool = False
    by_group: bool = False


@dataclass(frozen=True)
class Filter:
    """A rule or model that scores images. Scores delete nothing: selection applies a stage's thresholds to them.

    Attributes:
      name: prefix of its columns, as in `resolution.width`.
      version: raised whenever the same image would get another score, which makes stored scores stale.
      columns: {name: (type, meaning)} of every column: int, float, bool, str, or lists of these with one entry per
        caption. A value is None where there is no score.
      score: function from candidates to one dict of these columns per candidate, in order. Pure and picklable.
      thresholds: those that a stage may set for its scores.
      step: step of the selection funnel that its reasons belong to; "": its name.
      drops: why a record is dropped, or None. Without it, the reason of the first threshold that the record fails.
      drops_caption: why a record's caption of this number is dropped, or None.
      sees_broken: whether it also scores images that do not decode. Otherwise their columns are None.
      model: digest of the weights behind the scores. Other weights make stored scores stale.
      optional: whether its model may be absent (`model` None). Then it scores nothing, and selection warns.
      needs: what to do to get its model.
      on_device: whether its model runs in JAX, in the one process that owns the accelerator.
    """

    name: str
    version: int
    columns: dict[str, tuple[Any, str]]
    score: Callable[[Sequence[Candidate]], list[dict]]
    thresholds: tuple[Threshold, ...] = ()
    step: str = ""
    drops: Callable[[Row, Chosen], str | None] | None = None
    drops_caption: Callable[[Row, int, Chosen], str | None] | None = None
    sees_broken: bool = False
    model: str | None = None
    optional: bool = False
    needs: str = ""
    on_device: bool = False

    @property
    def can_score(self) -> bool:
        return not self.optional or self.model is not None

    def reason(self, row: Row, chosen: Chosen) -> str | None:
        """Why a record is dropped for this filter's scores; None: it stays."""
        if self.drops is not None:
            return self.drops(row, chosen)
        failed = (one.reason for one in self.thresholds if one.column and self._fails(one, row, chosen))
        return next(failed, None)

    def _fails(self, threshold: Threshold, row: Row, chosen: Chosen) -> bool:
        value, cut = row[f"{self.name}.{threshold.column}"], getattr(chosen, threshold.name)
        if value is None or any(exemption.applies(row, chosen) for exemption in threshold.exempt):
            return False
        return value < cut if threshold.keeps == "above" else value > cut


def within(grey: Image.Image, side: int) -> Image.Image:
    """Averages a grey image down to at most `side` pixels wide and high; a smaller one stays as it is."""
    factor = side / max(grey.size)
    if factor >= 1:
        return grey
    width, height = (max(1, round(length * factor)) for length in grey.size)
    return grey.resize((width, height), Image.Resampling.BOX)
