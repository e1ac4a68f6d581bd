"""Selection: thresholds turn scores into the list of kept records. A cheap second step: no image is read."""

import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float, Int64

from data_pipeline.atomic import write_atomic
from data_pipeline.filters import CASCADE, TRIALS
from data_pipeline.filters.alignment import ALIGNMENT
from data_pipeline.filters.cluster import CLUSTER
from data_pipeline.filters.duplicates import DUPLICATES
from data_pipeline.filters.label_alignment import CAVEAT, LABEL_ALIGNMENT
from data_pipeline.funnel import Step, Tally, table
from data_pipeline.near_groups import group_near
from data_pipeline.pair_scores import MIN_ENTROPY, SAME, read_pairs
from data_pipeline.pairs import MAX_DIFFERENCE, MAX_DISTANCE, MAX_GRADIENT
from data_pipeline.percentiles import Cuts, class_of, find_cuts
from data_pipeline.rules import LOWEST_AESTHETIC, RULES, UNRELATED, caption_reasons
from data_pipeline.scores import read_scores, unscored
from data_pipeline.shards import digest_of, read_manifest

INDEX = "selection.parquet"  # of a folder of records, unless it is called otherwise
ALIGNMENTS = {filter.name: filter for filter in (ALIGNMENT, LABEL_ALIGNMENT)}


@dataclass(frozen=True)
class Thresholds:
    """What a training stage asks of its records. Broken images never pass.

    Those of image quality, compression and borders ask for nothing by default: they belong to later stages.

    Attributes:
      pairs, edits: whether image-text pairs, and whether edits are wanted.
      synthetic: whether pairs tagged `synthetic/..` are, too.
      min_side: pixels of the shorter side, upright.
      max_aspect: longer over shorter side.
      drop_contradictory_orientation: drop files that contradict themselves about which side is up.
      min_bits, min_edges: a picture with less entropy *and* fewer edges is empty (`filters.entropy`).
      max_roughness: a rougher picture is noise.
      min_tokens, max_tokens: of a caption; a pair stays as long as one of its captions does, an edit as long as one of
        its instructions.
      max_instruction_tokens: of an instruction, which is shorter than the longest captions.
      min_script: share of an instruction's letters in the script of the language that it claims; names and brands of
        other scripts are few.
      name_sources: leave out instructions of an edit tagged `edit/compose` that do not name all of several sources.
      max_edit_aspect: ratio of the aspects of source and target, of edits tagged `edit/local`, `edit/global` or
        `edit/background`, whose target is the source's picture.
      min_shared: share of the target's blocks that the source shows too, of local and global edits.
      max_shift: of the target of these, as a share of its longer side.
      min_changed: share of the picture that an edit changes strongly.
      min_difference: grey levels by which any but a local edit may change the picture in the mean instead.
      max_changed: share of the picture that a local edit changes.
      min_unchanged_psnr: decibels, of what a local edit leaves alone.
      alignment_by: the filter whose cosines the next two cut: `alignment`, or for a trial without a CLIP
        `label_alignment`, which is no ground for a decision about data.
      min_alignment: cosine of a caption with its picture; depends on the model that scored.
      min_alignment_percentile: leaves out this percentage of all scored captions of each language and class, the worst
        aligned (`percentiles`).
      max_run: longest run of one character in a caption.
      min_compressed: smallest ratio of compression of a caption of at least `repetitive_tokens` tokens; one that
        repeats itself compresses to less.
      repetitive_tokens: see there; shorter captions compress too little to tell.
      min_clarity: variance of the Laplacian; pictures below `near_min_entropy` bits are flat by design and exempt.
      min_brightness, max_brightness: mean grey level, 0..1; the same are exempt.
      max_noise: grey levels.
      min_jpeg_quality: 1..100.
      min_bits_per_pixel: of JPEG files; pictures below `near_min_entropy` bits are exempt.
      max_nsfw: probability of an unsafe picture from which it is dropped.
      min_aesthetic: of the head's scale; 0 asks for nothing.
      min_aesthetic_percentile: leaves out this percentage of the pictures of each class, the least beautiful.
      max_per_class: records of one class (tag) that are kept, drawn by the hash of their keys; 0: all. Of several
        classes, every one must have room; records without a class always stay.
      max_per_cluster: records of one cluster (`filters.cluster`) that are kept, drawn likewise; 0: all.
      require: filters whose absent scores are an error; others without scores drop nothing and are named.
      max_repetition: of fine structure at a distance, as tiled watermarks have it (`filters.watermark`); pictures below
        `near_min_entropy` bits are exempt.
      max_border: share of the picture that bars on opposite sides take; exempt are pictures below `near_min_entropy`
        bits, such as pages of text, and those tagged `design/..` or `synthetic/..`.
      drop_exact_duplicates: keep only the first, by key, of files with the same bytes or the same pixels.
      drop_near_duplicates: keep only the first, by key, of each group of near duplicates (`pairs`): two whose hashes
        are within one of the next two bounds, and whose thumbnails are within the third.
      near_distance: largest distance of the 64-bit perceptual hashes.
      near_gradient: largest distance of the 64-bit gradient hashes.
      near_difference: largest difference of the thumbnails, in grey levels of 255 (`pairs.differences`).
      near_min_entropy: bits; flatter pictures are never called near duplicates.

    Raises:
      ValueError: for a value out of its range.
    """

    pairs: bool = True
    edits: bool = True
    synthetic: bool = True
    min_side: int = 256
    max_aspect: float = 3.0
    drop_contradictory_orientation: bool = True
    min_bits: float = 1.0
    min_edges: float = 0.0005
    max_roughness: float = 0.8
    min_tokens: int = 3
    max_tokens: int = 1024
    max_instruction_tokens: int = 512
    min_script: float = 0.2
    name_sources: bool = True
    max_edit_aspect: float = 1.03
    min_shared: float = 0.2
    max_shift: float = 0.004
    min_changed: float = 0.0005
    max_changed: float = 0.7
    min_difference: float = 1.0
    min_unchanged_psnr: float = 32.0
    alignment_by: str = ALIGNMENT.name
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
    max_repetition: float = 1.0
    max_nsfw: float = 0.5
    min_aesthetic: float = 0.0
    min_aesthetic_percentile: float = 0.0
    max_per_class: int = 0
    max_per_cluster: int = 0
    require: tuple[str, ...] = ()
    drop_exact_duplicates: bool = True
    drop_near_duplicates: bool = True
    near_distance: int = 8
    near_gradient: int = 4
    near_difference: float = 9.0
    near_min_entropy: float = 3.0

    def __post_init__(self):
        for name, (low, high) in _RANGES.items():
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} is {getattr(self, name)}; choose between {low} and {high}")
        for least, most in (("min_tokens", "max_tokens"), ("min_brightness", "max_brightness")):
            low, high = getattr(self, least), getattr(self, most)
            if low > high:
                raise ValueError(f"{least} is {low}, above {most} {high}: nothing would be left")
        if self.alignment_by not in ALIGNMENTS:
            raise ValueError(f"alignment_by is {self.alignment_by!r}; choose one of {sorted(ALIGNMENTS)}")
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
    "max_instruction_tokens": (1, 1 << 20),
    "min_script": (0, 1),
    "max_edit_aspect": (1, 1e6),
    "min_shared": (0, 1),
    "max_shift": (0, 1),
    "min_changed": (0, 1),
    "max_changed": (0, 1),
    "min_difference": (0, 255),
    "min_unchanged_psnr": (0, 99),
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
    "max_repetition": (0, 1),
    "max_nsfw": (0, 1),
    "min_aesthetic": (0, 100),
    "min_aesthetic_percentile": (0, 100),
    "max_per_class": (0, 1 << 62),
    "max_per_cluster": (0, 1 << 62),
    "near_distance": (0, MAX_DISTANCE),
    "near_gradient": (0, MAX_GRADIENT),
    "near_difference": (0, MAX_DIFFERENCE),
    "near_min_entropy": (MIN_ENTROPY, 8),
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
      trials: filters whose scores are for trials only, and what this selection did with them.
      records: digest of the records, see `shards.digest_of`.
    """

    thresholds: Thresholds
    kept: tuple[Kept, ...]
    dropped: dict[str, Dropped]
    steps: tuple[Step, ...]
    not_scored: dict[str, str]
    trials: dict[str, str]
    records: str

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(record.key for record in self.kept)

    def table(self):
        """The funnel as a `rich.table.Table`, which says below what was not scored, and what is for trials only."""
        view = table("selection", self.steps)
        lines = [f"{name.upper()} WAS NOT SCORED, nothing is dropped: {x}" for name, x in self.not_scored.items()]
        lines += [f"{name.upper()} {text}" for name, text in self.trials.items()]
        if lines:
            view.caption, view.caption_style = "\n".join(lines), "bold red"
        return view

    def to_dict(self) -> dict:
        """Thresholds, filter versions and funnel, for JSON; without the list of keys, which may be long."""
        return {
            "records": self.records,
            "thresholds": asdict(self.thresholds),
            "filters": {filter.name: filter.version for filter in (*CASCADE, *TRIALS)},
            "not_scored": self.not_scored,
            "trials": self.trials,
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
    if thresholds.max_per_cluster and CLUSTER.name in not_scored:
        raise ValueError(f"{folder}: max_per_cluster asks for clusters, which were not scored: {CLUSTER.needs}")
    trials, by = _trials(folder, thresholds), ALIGNMENTS[thresholds.alignment_by]
    cuts = find_cuts(folder, thresholds.min_alignment_percentile, thresholds.min_aesthetic_percentile, by)
    tallies = {name: Tally() for name in [*RULES, "duplicates", "distribution"]}
    dropped: dict[str, Dropped] = {}
    survivors: list[Kept] = []
    tags: list[list[str]] = []
    clusters: list[list[str]] = []
    bits: list[float] = []

    def drop(key: str, why: Dropped) -> None:
        dropped[key] = why
        tallies[why.step].add(why.reason, key)

    count = 0
    for row in read_scores(folder, [filter for filter in (*CASCADE, *TRIALS) if filter is not DUPLICATES]):
        row[UNRELATED] = _unrelated(row, thresholds, cuts)
        row[LOWEST_AESTHETIC] = max(thresholds.min_aesthetic, cuts.aesthetic.get((class_of(row),), 0.0))
        reasons = ((name, rule(row, thresholds)) for name, rule in RULES.items())
        failed = next(((name, reason) for name, reason in reasons if reason is not None), None)
        if failed:
            drop(row["key"], Dropped(*failed))
        else:
            captions = tuple(i for i, reason in enumerate(caption_reasons(row, thresholds)) if reason is None)
            size = row["resolution.width"], row["resolution.height"]
            survivors.append(Kept(row["key"], count, *size, captions, row["description.conditions"]))
            tags.append(row["description.tags"])
            clusters.append([str(row["cluster.id"])])
            bits.append(row["entropy.bits"])
        count += 1
    late = _duplicates(folder, survivors, np.array(bits, np.float64), thresholds)
    left = {record.key: own for record, own in zip(survivors, tags, strict=True) if record.key not in late}
    late |= _crowded(left, thresholds.max_per_class, "class_is_full")
    left = {record.key: own for record, own in zip(survivors, clusters, strict=True) if record.key not in late}
    late |= _crowded(left, thresholds.max_per_cluster, "cluster_is_full")
    for key in sorted(late):
        drop(key, late[key])

    steps = []
    for name, tally in tallies.items():
        steps.append(Step(name, count, tally))
        count -= tally.total
    kept = tuple(record for record in survivors if record.key not in late)
    records = digest_of(read_manifest(folder))
    return Selection(thresholds, kept, dropped, tuple(steps), not_scored, trials, records)


def _trials(folder: Path | str, thresholds: Thresholds) -> dict[str, str]:
    """For every filter of `TRIALS` that scored, what its scores do here."""
    absent = unscored(folder, TRIALS)
    if needs := absent.get(thresholds.alignment_by):
        raise ValueError(f"{folder}: alignment_by names {thresholds.alignment_by}, which was not scored: {needs}")
    scored = [filter.name for filter in TRIALS if filter.name not in absent]
    decides = {thresholds.alignment_by: "DECIDES IN PLACE OF ALIGNMENT"}
    return {name: f"{decides.get(name, 'drops nothing')}, {CAVEAT}" for name in scored}


def _unrelated(row: dict, thresholds: Thresholds, cuts: Cuts) -> list[bool]:
    """For every caption whether its alignment is too low; an instruction of an edit does not describe its picture."""
    cosines = row[f"{thresholds.alignment_by}.cosines"]
    if cosines is None or row["description.conditions"]:
        return [False] * len(row["description.kinds"])
    groups = ((language, class_of(row)) for language in row["description.languages"])
    lows = [max(thresholds.min_alignment, cuts.alignment.get(group, -1.0)) for group in groups]
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


def read_selection(path: Path) -> Iterator[Kept]:
    """Kept records in the order of their folder, read piece by piece.

    Raises:
      ValueError: if the file is missing or no selection.
    """
    try:
        for batch in _open_selection(path).iter_batches():
            for row in batch.to_pylist():
                yield Kept(**row | {"captions": tuple(row["captions"])})
    except (pa.ArrowException, TypeError, KeyError) as error:
        raise ValueError(f"{path} is not a selection; select again: {error}") from None


def selection_facts(path: Path) -> dict:
    """What a selection says of itself, as `Selection.to_dict`; raises as `read_selection`."""
    file = _open_selection(path)
    try:
        return json.loads(file.schema_arrow.metadata[b"selection"])
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is not a selection; select again: {error}") from None


def _open_selection(path: Path) -> pq.ParquetFile:
    if not path.is_file():
        raise ValueError(f"{path} does not exist; run `qi2 data select` first")
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a selection; select again: {error}") from None


def _crowded(groups: dict[str, list[str]], limit: int, reason: str) -> dict[str, Dropped]:
    """Which keys to drop so that no group has more than its number; a pure function of keys and groups."""
    drops: dict[str, Dropped] = {}
    counts: Counter[str] = Counter()
    if limit:
        for key in sorted(groups, key=lambda key: (hashlib.sha256(key.encode()).digest(), key)):
            if any(counts[group] >= limit for group in groups[key]):
                drops[key] = Dropped("distribution", reason)
            else:
                counts.update(set(groups[key]))
    return drops


def _duplicates(
    folder: Path | str, survivors: list[Kept], bits: Float[np.ndarray, " n"], thresholds: Thresholds
) -> dict[str, Dropped]:
    """Which keys to drop: for same bytes, then same pixels, then nearness among those that are left."""
    drops: dict[str, Dropped] = {}
    if not (thresholds.drop_exact_duplicates or thresholds.drop_near_duplicates):
        return drops
    pairs = read_pairs(folder)
    left = np.array(sorted(range(len(survivors)), key=lambda position: survivors[position].key), np.int64)
    record = np.array([survivor.index for survivor in survivors], np.int64)

    def keep_first(reason: str, group: Int64[np.ndarray, " n"]) -> None:
        nonlocal left
        _, first, own = np.unique(group, return_index=True, return_inverse=True)
        first = first[own]
        for position in np.flatnonzero(first != np.arange(len(left))):
            kept = survivors[left[first[position]]].key
            drops[survivors[left[position]].key] = Dropped("duplicates", reason, kept)
        left = left[first == np.arange(len(left))]

    if thresholds.drop_exact_duplicates:
        for name in ("bytes", "pixels"):
            keep_first(f"same_{name}", pairs.same[record[left], SAME.index(name)])
    if thresholds.drop_near_duplicates:
        near = pairs.near
        proposed = (near["distance"] <= thresholds.near_distance) | (near["gradient"] <= thresholds.near_gradient)
        near = near[proposed & (near["difference"] <= thresholds.near_difference)]
        content = pairs.same[record[left], SAME.index("fingerprints")]
        keep_first("near", group_near(content, bits[left] >= thresholds.near_min_entropy, near["left"], near["right"]))
    for key, why in drops.items():  # the copy of a copy stands for the one that was kept
        while why.duplicate_of in drops:
            why = Dropped(why.step, why.reason, drops[why.duplicate_of].duplicate_of)
        drops[key] = why
    return drops
