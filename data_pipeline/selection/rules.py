"""Rules: why a record or a caption is left out, from its scores and the thresholds of a stage; None: it stays.

Pure functions of one record, asked in the order of RULES. `selection` asks them.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from data_pipeline.filters.caption_length import CAPTION_LENGTH
from data_pipeline.filters.instruction import INSTRUCTION_TEXT
from data_pipeline.filters.quality import TWO_LEVEL
from data_pipeline.records.schema import INSTRUCTION
from data_pipeline.selection.edit_rules import edit_reason, instruction_reason

if TYPE_CHECKING:
    from data_pipeline.selection.thresholds import Thresholds

# Found from the scores of all records before the rules are asked: of each caption, and what a picture must reach.
UNRELATED, LOWEST_AESTHETIC = "alignment.unrelated", "aesthetic.lowest"

SYNTHETIC = "synthetic/"
DESIGNED = (SYNTHETIC, "design/")  # tags of pages, slides and posters, whose margins belong to them


def _task(row: dict, thresholds: "Thresholds") -> str | None:
    if row["description.conditions"]:
        return None if thresholds.edits else "edit"
    if not thresholds.synthetic and any(tag.startswith(SYNTHETIC) for tag in row["description.tags"]):
        return "synthetic"
    return None if thresholds.pairs else "pair"


def _orientation(row: dict, thresholds: "Thresholds") -> str | None:
    return row["orientation.contradiction"] if thresholds.drop_contradictory_orientation else None


def _resolution(row: dict, thresholds: "Thresholds") -> str | None:
    if row["resolution.short_side"] < thresholds.min_side:
        return "too_small"
    return "too_long" if row["resolution.aspect"] > thresholds.max_aspect else None


def _entropy(row: dict, thresholds: "Thresholds") -> str | None:
    low = (row[f"entropy.{name}bits"] < thresholds.min_bits for name in ("", "colour_"))
    plain = (row[f"entropy.{name}edges"] < thresholds.min_edges for name in ("", "colour_"))
    if all((*low, *plain)):
        return "empty"
    return "noise" if row["entropy.roughness"] > thresholds.max_roughness else None


def _captions(row: dict, thresholds: "Thresholds") -> str | None:
    """The reason of the first caption, when none is left."""
    reasons = caption_reasons(row, thresholds)
    return None if None in reasons else next((reason for reason in reasons if reason != "describes"), "no_caption")


def caption_reasons(row: dict, thresholds: "Thresholds") -> list[str | None]:
    """For every caption why it is left out; None: it stays. Of an edit, only instructions stay."""
    edit = bool(row["description.conditions"])

    def reason(kind: str, unrelated: bool, own: dict) -> str | None:
        if edit and kind != INSTRUCTION:
            return "describes"
        if own["caption_length.reserved"]:
            return "reserved_token"
        tokens = own["caption_length.tokens"]
        if tokens < thresholds.min_tokens:
            return "too_short"
        if tokens > thresholds.max_tokens or (edit and tokens > thresholds.max_instruction_tokens):
            return "too_many_tokens"
        if own["caption_length.refusal"]:
            return "refusal"
        if unrelated:
            return "unrelated"
        if edit and (fault := instruction_reason(row, own, thresholds)):
            return fault
        repetitive = tokens >= thresholds.repetitive_tokens
        repetitive &= own["caption_length.compressed"] < thresholds.min_compressed
        return "repeats_itself" if own["caption_length.longest_run"] > thresholds.max_run or repetitive else None

    columns = [f"{filter.name}.{column}" for filter in (CAPTION_LENGTH, INSTRUCTION_TEXT) for column in filter.columns]
    owns = (dict(zip(columns, values, strict=True)) for values in zip(*(row[name] for name in columns), strict=True))
    return [reason(*values) for values in zip(row["description.kinds"], row[UNRELATED], owns, strict=True)]


def _flat(row: dict, thresholds: "Thresholds") -> bool:
    """Whether a picture is flat by design, as drawings and pages of text are."""
    return row["entropy.bits"] < thresholds.near_min_entropy


def _quality(row: dict, thresholds: "Thresholds") -> str | None:
    if row["quality.noise"] > thresholds.max_noise and row["quality.two_level"] < TWO_LEVEL:
        return "noisy"
    if _flat(row, thresholds):
        return None
    if row["quality.clarity"] < thresholds.min_clarity:
        return "blurred"
    if row["quality.brightness"] < thresholds.min_brightness:
        return "too_dark"
    return "too_bright" if row["quality.brightness"] > thresholds.max_brightness else None


def _compression(row: dict, thresholds: "Thresholds") -> str | None:
    quality = row["compression.jpeg_quality"]
    if quality is None:
        return None
    thin = row["compression.bits_per_pixel"] < thresholds.min_bits_per_pixel and not _flat(row, thresholds)
    return "compressed_too_much" if quality < thresholds.min_jpeg_quality or thin else None


def _border(row: dict, thresholds: "Thresholds") -> str | None:
    designed = _flat(row, thresholds) or any(tag.startswith(DESIGNED) for tag in row["description.tags"])
    return "border" if not designed and row["border.bars"] and row["border.area"] > thresholds.max_border else None


def _watermark(row: dict, thresholds: "Thresholds") -> str | None:
    repeats = row["watermark.repetition"] > thresholds.max_repetition  # as lines of text do too
    return "repeats" if repeats and not _flat(row, thresholds) else None


# Step -> why a record is dropped there. Duplicates come last: the copy that is kept is one that passed all of these.
RULES: dict[str, Callable[[dict, "Thresholds"], str | None]] = {
    "broken": lambda row, _: row["broken.reason"],
    "task": _task,
    "orientation": _orientation,
    "resolution": _resolution,
    "entropy": _entropy,
    "captions": _captions,
    "edit": edit_reason,
    "quality": _quality,
    "compression": _compression,
    "border": _border,
    "watermark": _watermark,
    "nsfw": lambda row, thresholds: (
        "unsafe" if row["nsfw.score"] is not None and row["nsfw.score"] >= thresholds.max_nsfw else None
    ),
    "aesthetic": lambda row, thresholds: (
        "not_beautiful"
        if row["aesthetic.score"] is not None and row["aesthetic.score"] < row[LOWEST_AESTHETIC]
        else None
    ),
}
