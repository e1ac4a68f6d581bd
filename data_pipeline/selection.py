"""Selection: thresholds turn scores into the list of kept records. A cheap second step: no image is read."""

import hashlib
import io
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.atomic import write_atomic
from data_pipeline.filters import CASCADE
from data_pipeline.filters.alignment import ALIGNMENT
from data_pipeline.filters.description import DESCRIPTION
from data_pipeline.filters.duplicates import group_equal, group_near, parse_fingerprints
from data_pipeline.funnel import Step, Tally, table
from data_pipeline.records import INSTRUCTION
from data_pipeline.scores import read_scores, unscored


@dataclass(frozen=True)
class Thresholds:
    """What a training stage asks of its records. Broken images never pass.

    Those of image quality, compression and borders ask for nothing by default: they belong to later stages.

    Attributes:
      pairs, edits: whether image-text pairs, and whether edits are wanted.
      min_side: pixels of the shorter side, upright.
      max_aspect: longer over shorter side.
      drop_contradictory_orientation: drop files that contradict themselves about which side is up.
      min_bits, min_edges: a picture with less entropy *and* fewer edges is empty (`filters.entropy`).
      max_roughness: a rougher picture is noise.
      min_tokens, max_tokens: of a caption; a pair stays as long as one of its captions does, an edit as long as one of
        its instructions.
      min_alignment: cosine of a caption with its picture; depends on the model that scored.
      min_alignment_percentile: leaves out this percentage of all scored captions of each language, the worst aligned.
      max_run: longest run of one character in a caption.
      min_compressed: smallest ratio of compression of a caption of at least `repetitive_tokens` tokens; one that
        repeats itself compresses to less.
      repetitive_tokens: see there; shorter captions compress too little to tell.
      min_clarity: variance of the Laplacian; pictures below `near_min_entropy` bits are flat by design and exempt.
      min_brightness, max_brightness: mean grey level, 0..1; the same are exempt.
      max_noise: grey levels.
      min_jpeg_quality: 1..100.
      min_bits_per_pixel: of JPEG files, whose pictures are seldom flat.
      max_nsfw: probability of an unsafe picture from which it is dropped.
      min_aesthetic: of the head's scale; 0 asks for nothing.
      max_per_class: records of one class (tag) that are kept, drawn by the hash of their keys; 0: all. Of several
        classes, every one must have room; records without a class always stay.
      require: filters whose absent scores are an error; others without scores drop nothing and are named.
      max_border: share of the picture that bars on opposite sides take.
      drop_exact_duplicates: keep only the first, by key, of files with the same bytes or the same pixels.
      drop_near_duplicates: keep only the first, by key, of each group of near duplicates (`filters.duplicates`).
      near_distance: largest distance of the 64-bit perceptual hashes; recompression and rescaling rarely exceed it.
      near_difference: largest difference of any thumbnail cell, in grey levels of 255.
      near_min_entropy: bits; flatter pictures are never called near duplicates.

    Raises:
      ValueError: for a value out of its range.
    """

    pairs: bool = True
    edits: bool = True
    min_side: int = 256
    max_aspect: float = 3.0
    drop_contradictory_orientation: bool = True
    min_bits: float = 1.0
    min_edges: float = 0.0005
    max_roughness: float = 0.8
    min_tokens: int = 3
    max_tokens: int = 1024
    min_alignment: float = -1.0
    min_alignment_percentile: float = 0.0
    max_run: int = 20
    min_compressed: float = 0.2
    repetitive_tokens: int = 50
    min_clarity: float = 0.0
    min_brightness: float = 0.0
    max_brightness: float = 1.0
    max_noise: float = 255.0
    min_jpeg_quality: float = 0.0
    min_bits_per_pixel: float = 0.0
    max_border: float = 1.0
    max_nsfw: float = 0.5
    min_aesthetic: float = 0.0
    max_per_class: int = 0
    require: tuple[str, ...] = ()
    drop_exact_duplicates: bool = True
    drop_near_duplicates: bool = True
    near_distance: int = 6
    near_difference: int = 12
    near_min_entropy: float = 3.0

    def __post_init__(self):
        for name, (low, high) in _RANGES.items():
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} is {getattr(self, name)}; choose between {low} and {high}")
        if unknown := sorted(set(self.require) - {filter.name for filter in CASCADE}):
            raise ValueError(f"require names filters {unknown} that do not exist")


_RANGES = {
    "min_side": (1, 1 << 20),
    "max_aspect": (1, 1e6),
    "min_bits": (0, 8),
    "min_edges": (0, 1),
    "max_roughness": (0, 2),
    "min_tokens": (0, 1 << 20),
    "max_tokens": (1, 1 << 20),
    "min_alignment": (-1, 1),
    "min_alignment_percentile": (0, 100),
    "max_run": (1, 1 << 20),
    "min_compressed": (0, 1),
    "repetitive_tokens": (0, 1 << 20),
    "min_clarity": (0, 1e6),
    "min_brightness": (0, 1),
    "max_brightness": (0, 1),
    "max_noise": (0, 255),
    "min_jpeg_quality": (0, 100),
    "min_bits_per_pixel": (0, 1e3),
    "max_border": (0, 1),
    "max_nsfw": (0, 1),
    "min_aesthetic": (0, 100),
    "max_per_class": (0, 1 << 62),
    "near_distance": (0, 64),
    "near_difference": (0, 255),
    "near_min_entropy": (0, 8),
}


@dataclass(frozen=True)
class Kept:
    """A kept record.

    Attributes:
      key, index: its name, and its position in the `RecordFolder`.
      width, height: upright size in pixels.
      captions: which of its captions to use: of an edit the instructions.
      conditions: number of condition images.
    """

    key: str
    index: int
    width: int
    height: int
    captions: tuple[int, ...]
    conditions: int = 0


@dataclass(frozen=True)
class Dropped:
    """Why a record was dropped: the step, the reason, and for duplicates the key of the record kept in its place."""

    step: str
    reason: str
    duplicate_of: str | None = None


@dataclass(frozen=True)
class Selection:
    """The outcome.

    Attributes:
      thresholds: what was asked.
      kept: records in the order of the folder.
      dropped: the others, by key.
      steps: the funnel of counts.
      not_scored: filters that could drop nothing because their model was absent, and what they need.
    """

    thresholds: Thresholds
    kept: tuple[Kept, ...]
    dropped: dict[str, Dropped]
    steps: tuple[Step, ...]
    not_scored: dict[str, str]

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(record.key for record in self.kept)

    def table(self):
        """The funnel as a `rich.table.Table`, which says below what was not scored."""
        view = table("selection", self.steps)
        if self.not_scored:
            lines = (f"{name.upper()} WAS NOT SCORED, nothing is dropped: {x}" for name, x in self.not_scored.items())
            view.caption, view.caption_style = "\n".join(lines), "bold red"
        return view

    def to_dict(self) -> dict:
        """Thresholds, filter versions and funnel, for JSON; without the list of keys, which may be long."""
        return {
            "thresholds": asdict(self.thresholds),
            "filters": {filter.name: filter.version for filter in CASCADE},
            "not_scored": self.not_scored,
            "kept": len(self.kept),
            "funnel": [step.to_dict() for step in self.steps],
        }


def select(folder: Path | str, thresholds: Thresholds = Thresholds()) -> Selection:
    """Applies thresholds to the scores of a folder.

    Every step sees only what the steps before it kept, so a broken or too small copy never stands for its group.

    Raises:
      ValueError: when scores are missing (run `cascade.score` first).
    """
    not_scored = unscored(folder, CASCADE)
    if missing := {name: needs for name, needs in not_scored.items() if name in thresholds.require}:
        raise ValueError(
            f"{folder} lacks scores that data.thresholds.require names: {missing}; score again, or require less"
        )
    cuts = _alignment_cuts(folder, thresholds)
    tallies = {name: Tally() for name in [*RULES, "duplicates", "distribution"]}
    dropped: dict[str, Dropped] = {}
    survivors = []

    def drop(key: str, why: Dropped) -> None:
        dropped[key] = why
        tallies[why.step].add(why.reason, key)

    count = 0
    for row in read_scores(folder, CASCADE):
        row[_UNRELATED] = _unrelated(row, thresholds, cuts)
        reasons = ((name, rule(row, thresholds)) for name, rule in RULES.items())
        failed = next(((name, reason) for name, reason in reasons if reason is not None), None)
        if failed:
            drop(row["key"], Dropped(*failed))
        else:
            captions = tuple(i for i, reason in enumerate(_caption_reasons(row, thresholds)) if reason is None)
            size = row["resolution.width"], row["resolution.height"]
            kept_row = Kept(row["key"], count, *size, captions, row["description.conditions"])
            columns = ("key", "duplicates.", "entropy.bits", "description.tags")
            survivors.append((kept_row, {name: value for name, value in row.items() if name.startswith(columns)}))
        count += 1
    late = _duplicates([columns for _, columns in survivors], thresholds)
    left = {row["key"]: row["description.tags"] for _, row in survivors if row["key"] not in late}
    late |= _crowded(left, thresholds.max_per_class)
    for key in sorted(late):
        drop(key, late[key])

    steps = []
    for name, tally in tallies.items():
        steps.append(Step(name, count, tally))
        count -= tally.total
    kept = tuple(record for record, _ in survivors if record.key not in late)
    return Selection(thresholds, kept, dropped, tuple(steps), not_scored)


_UNRELATED = "alignment.unrelated"  # of each caption, found from its score before the rules are asked


def _alignment_cuts(folder: Path | str, thresholds: Thresholds) -> dict[str | None, float]:
    """For every language the cosine below which the wanted percentage of its captions lies."""
    if thresholds.min_alignment_percentile == 0:
        return {}
    cosines: dict[str | None, list[float]] = {}
    for row in read_scores(folder, (DESCRIPTION, ALIGNMENT)):
        if not row["description.conditions"]:
            for language, cosine in zip(row["description.languages"], row["alignment.cosines"] or (), strict=False):
                cosines.setdefault(language, []).append(cosine)
    if not cosines:
        raise ValueError(
            f"{folder}: min_alignment_percentile is {thresholds.min_alignment_percentile}, but alignment was not "
            f"scored: {ALIGNMENT.needs}"
        )
    return {name: float(np.percentile(values, thresholds.min_alignment_percentile)) for name, values in cosines.items()}


def _unrelated(row: dict, thresholds: Thresholds, cuts: dict[str | None, float]) -> list[bool]:
    """For every caption whether its alignment is too low; an instruction of an edit does not describe its picture."""
    cosines = row["alignment.cosines"]
    if cosines is None or row["description.conditions"]:
        return [False] * len(row["description.kinds"])
    lows = [max(thresholds.min_alignment, cuts.get(language, -1.0)) for language in row["description.languages"]]
    return [cosine < low for cosine, low in zip(cosines, lows, strict=True)]


def write_selection(path: Path, selection: Selection) -> None:
    """Writes the kept records as Parquet, a row each, with thresholds and funnel as JSON in the file's metadata."""
    rows = [asdict(kept) | {"captions": list(kept.captions)} for kept in selection.kept]
    types = {"key": pa.string(), "captions": pa.list_(pa.int64())}
    schema = pa.schema([(field.name, types.get(field.name, pa.int64())) for field in fields(Kept)])
    rows_table = pa.Table.from_pylist(rows, schema.with_metadata({"selection": json.dumps(selection.to_dict())}))
    buffer = io.BytesIO()
    pq.write_table(rows_table, buffer, compression="zstd")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, buffer.getvalue())


def _task(row: dict, thresholds: Thresholds) -> str | None:
    if row["description.conditions"]:
        return None if thresholds.edits else "edit"
    return None if thresholds.pairs else "pair"


def _orientation(row: dict, thresholds: Thresholds) -> str | None:
    return row["orientation.contradiction"] if thresholds.drop_contradictory_orientation else None


def _resolution(row: dict, thresholds: Thresholds) -> str | None:
    if row["resolution.short_side"] < thresholds.min_side:
        return "too_small"
    return "too_long" if row["resolution.aspect"] > thresholds.max_aspect else None


def _entropy(row: dict, thresholds: Thresholds) -> str | None:
    if row["entropy.bits"] < thresholds.min_bits and row["entropy.edges"] < thresholds.min_edges:
        return "empty"
    return "noise" if row["entropy.roughness"] > thresholds.max_roughness else None


def _captions(row: dict, thresholds: Thresholds) -> str | None:
    """The reason of the first caption, when none is left."""
    reasons = _caption_reasons(row, thresholds)
    return None if None in reasons else next((reason for reason in reasons if reason != "describes"), "no_caption")


def _caption_reasons(row: dict, thresholds: Thresholds) -> list[str | None]:
    """For every caption why it is left out; None: it stays. Of an edit, only instructions stay."""
    edit = bool(row["description.conditions"])

    def reason(
        kind: str, unrelated: bool, tokens: int, refusal: bool, reserved: bool, run: int, compressed: float
    ) -> str | None:
        if edit and kind != INSTRUCTION:
            return "describes"
        if reserved:
            return "reserved_token"
        if tokens < thresholds.min_tokens:
            return "too_short"
        if tokens > thresholds.max_tokens:
            return "too_many_tokens"
        if refusal:
            return "refusal"
        if unrelated:
            return "unrelated"
        repetitive = tokens >= thresholds.repetitive_tokens and compressed < thresholds.min_compressed
        return "repeats_itself" if run > thresholds.max_run or repetitive else None

    columns = ("tokens", "refusal", "reserved", "longest_run", "compressed")
    found = [row["description.kinds"], row[_UNRELATED], *(row[f"caption_length.{name}"] for name in columns)]
    return [reason(*values) for values in zip(*found, strict=True)]


def _quality(row: dict, thresholds: Thresholds) -> str | None:
    if row["quality.noise"] > thresholds.max_noise:
        return "noisy"
    if row["entropy.bits"] < thresholds.near_min_entropy:
        return None
    if row["quality.clarity"] < thresholds.min_clarity:
        return "blurred"
    if row["quality.brightness"] < thresholds.min_brightness:
        return "too_dark"
    return "too_bright" if row["quality.brightness"] > thresholds.max_brightness else None


def _compression(row: dict, thresholds: Thresholds) -> str | None:
    quality = row["compression.jpeg_quality"]
    if quality is None:
        return None
    return (
        "compressed_too_much"
        if quality < thresholds.min_jpeg_quality or row["compression.bits_per_pixel"] < thresholds.min_bits_per_pixel
        else None
    )


def _border(row: dict, thresholds: Thresholds) -> str | None:
    return "border" if row["border.bars"] and row["border.area"] > thresholds.max_border else None


# Step -> why a record is dropped there. Duplicates come last: the copy that is kept is one that passed all of these.
RULES: dict[str, Callable[[dict, Thresholds], str | None]] = {
    "broken": lambda row, _: row["broken.reason"],
    "task": _task,
    "orientation": _orientation,
    "resolution": _resolution,
    "entropy": _entropy,
    "captions": _captions,
    "quality": _quality,
    "compression": _compression,
    "border": _border,
    "nsfw": lambda row, thresholds: (
        "unsafe" if row["nsfw.score"] is not None and row["nsfw.score"] >= thresholds.max_nsfw else None
    ),
    "aesthetic": lambda row, thresholds: (
        "not_beautiful"
        if row["aesthetic.score"] is not None and row["aesthetic.score"] < thresholds.min_aesthetic
        else None
    ),
}


def _crowded(tags: dict[str, list[str]], max_per_class: int) -> dict[str, Dropped]:
    """Which keys to drop so that no class has more than its number; a pure function of keys and tags."""
    drops: dict[str, Dropped] = {}
    counts: Counter[str] = Counter()
    if max_per_class:
        for key in sorted(tags, key=lambda key: (hashlib.sha256(key.encode()).digest(), key)):
            full = next((tag for tag in tags[key] if counts[tag] >= max_per_class), None)
            if full is None:
                counts.update(set(tags[key]))
            else:
                drops[key] = Dropped("distribution", "class_is_full")
    return drops


def _duplicates(rows: list[dict], thresholds: Thresholds) -> dict[str, Dropped]:
    """Which keys to drop: for same bytes, then same pixels, then nearness among those that are left."""
    rows = sorted(rows, key=lambda row: row["key"])
    drops: dict[str, Dropped] = {}

    def keep_first(reason: str, first: list[int]) -> None:
        nonlocal rows
        for position, row in enumerate(rows):
            if first[position] != position:
                drops[row["key"]] = Dropped("duplicates", reason, rows[first[position]]["key"])
        rows = [row for position, row in enumerate(rows) if first[position] == position]

    if thresholds.drop_exact_duplicates:
        keep_first("same_bytes", group_equal([row["duplicates.bytes_sha256"] for row in rows]))
        keep_first("same_pixels", group_equal([row["duplicates.pixels_sha256"] for row in rows]))
    if thresholds.drop_near_duplicates:
        near = group_near(
            *parse_fingerprints(rows),
            np.array([row["entropy.bits"] for row in rows], dtype=np.float64),
            max_distance=thresholds.near_distance,
            max_difference=thresholds.near_difference,
            min_entropy=thresholds.near_min_entropy,
        )
        keep_first("near", near)
    for key, why in drops.items():  # the copy of a copy stands for the one that was kept
        while why.duplicate_of in drops:
            why = Dropped(why.step, why.reason, drops[why.duplicate_of].duplicate_of)
        drops[key] = why
    return drops
