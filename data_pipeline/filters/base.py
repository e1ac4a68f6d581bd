"""The definition of a filter: a pure function from records to score columns, and thresholds on them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from PIL import Image

from data_pipeline.decoding.images import Decoded, UndecodableImage
from data_pipeline.records.schema import Record

Row = dict[str, Any]  # scores of one record by all filters: {"<filter>.<column>": score}
Settings = Any  # values of all thresholds as attributes, see `selection.thresholds.Thresholds`


@dataclass(frozen=True)
class Candidate:
    """A record with its decoded images, which all filters share.

    Attributes:
      record: stored record.
      decoded: decoded image; None if it or a condition image does not decode.
      failure: error of decoding, or None.
      conditions: decoded condition images of an edit.
    """

    record: Record
    decoded: Decoded | None
    failure: UndecodableImage | None
    conditions: tuple[Decoded, ...] = ()

    @property
    def target(self) -> Decoded:
        """The decoded image (the target of an edit), for filters that never see broken ones."""
        assert self.decoded is not None
        return self.decoded

    @property
    def images(self) -> tuple[Image.Image, ...]:
        """The image and all condition images, upright."""
        return tuple(decoded.image for decoded in (self.target, *self.conditions))


@dataclass(frozen=True)
class Exemption:
    """Records to which a threshold does not apply.

    Attributes:
      meaning: description of these records, for the documentation.
      applies: function that returns whether a record is exempt.
    """

    meaning: str
    applies: Callable[[Row, Settings], bool]


@dataclass(frozen=True)
class Threshold:
    """A number or switch of a stage's config, `data.thresholds.<name>`.

    Attributes:
      name: key in the config.
      default: value if the config sets none.
      meaning: explanation for the documentation.
      low, high: smallest and largest valid value; None for switches and names.
      column: column that is compared with it and that the report draws; None if there is no single column.
      keeps: side of the threshold on which records are kept.
      reason: reason for which records or captions are dropped. Unless the filter has a function `drops` or
        `drops_caption`, a comparison with the column decides.
      exempt: records to which it does not apply.
      applies_to: all records, only image-text pairs, or only edits.
      values: function that returns the scores that the report draws, if they are not simply the column.
      logarithmic: whether the report's histogram is logarithmic.
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
    values: Callable[[Row, Settings], list] | None = None
    logarithmic: bool = False
    by_group: bool = False


@dataclass(frozen=True)
class Filter:
    """A rule or model that scores images. Scores delete nothing: selection applies a stage's thresholds to them.

    Attributes:
      name: prefix of its columns, as in `resolution.width`.
      version: number that is raised whenever the same image would get another score; it makes stored scores stale.
      columns: {name: (type, meaning)} of every column. The type is int, float, bool, str, or a list of these with one
        entry per caption. A missing score is None.
      score: function from candidates to one dict of these columns per candidate, in order; pure and picklable.
      thresholds: thresholds that a stage may set for its scores.
      step: step of the selection funnel to which its reasons belong; "" means its name.
      drops: function that returns why a record is dropped, or None. By default, the reason is that of the first
        threshold that the record fails.
      drops_caption: function that returns why the caption with this number is dropped, or None.
      sees_broken: whether it also scores images that do not decode. Otherwise their columns are None.
      model: digest of the weights behind the scores. Other weights make stored scores stale.
      optional: whether its model may be absent (`model` is None). It then scores nothing, and selection warns.
      needs: instructions to the user for supplying its model.
      on_device: whether its model runs in JAX, in the single process that owns the accelerator.
    """

    name: str
    version: int
    columns: dict[str, tuple[Any, str]]
    score: Callable[[Sequence[Candidate]], list[dict]]
    thresholds: tuple[Threshold, ...] = ()
    step: str = ""
    drops: Callable[[Row, Settings], str | None] | None = None
    drops_caption: Callable[[Row, int, Settings], str | None] | None = None
    sees_broken: bool = False
    model: str | None = None
    optional: bool = False
    needs: str = ""
    on_device: bool = False

    @property
    def can_score(self) -> bool:
        return not self.optional or self.model is not None

    def reason(self, row: Row, settings: Settings) -> str | None:
        """Why a record is dropped for this filter's scores; None if it is kept."""
        if self.drops is not None:
            return self.drops(row, settings)
        failed = (one.reason for one in self.thresholds if one.column and self._fails(one, row, settings))
        return next(failed, None)

    def _fails(self, threshold: Threshold, row: Row, settings: Settings) -> bool:
        value, cut = row[f"{self.name}.{threshold.column}"], getattr(settings, threshold.name)
        if value is None or any(exemption.applies(row, settings) for exemption in threshold.exempt):
            return False
        return value < cut if threshold.keeps == "above" else value > cut


def reduce_to_side(grey: Image.Image, side: int) -> Image.Image:
    """Averages a grey image down to at most `side` pixels wide and high; smaller images stay as they are."""
    factor = side / max(grey.size)
    if factor >= 1:
        return grey
    width, height = (max(1, round(length * factor)) for length in grey.size)
    return grey.resize((width, height), Image.Resampling.BOX)
