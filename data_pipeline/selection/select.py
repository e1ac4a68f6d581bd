"""Selection: thresholds turn scores into the list of kept records. It is cheap, since it reads no images."""

import hashlib
import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int64

from data_pipeline.filters import CASCADE, TRIALS
from data_pipeline.filters.aesthetic import LOWEST_AESTHETIC
from data_pipeline.filters.alignment import UNRELATED
from data_pipeline.filters.base import Row
from data_pipeline.filters.cluster import CLUSTER
from data_pipeline.filters.duplicates import DUPLICATES
from data_pipeline.filters.label_alignment import CAVEAT
from data_pipeline.funnel import Step, Tally
from data_pipeline.records.shards import digest_of, read_manifest
from data_pipeline.scoring.near_groups import group_near
from data_pipeline.scoring.pair_scores import SAME, read_pairs
from data_pipeline.scoring.score_tables import read_scores, unscored
from data_pipeline.selection.index import Dropped, Kept, Selection
from data_pipeline.selection.percentiles import Cuts, class_of, find_cuts
from data_pipeline.selection.rules import CAPTIONS, RULES, caption_reasons
from data_pipeline.selection.thresholds import ALIGNMENTS, Thresholds

LOSSLESS = 101.0  # quality of lossless files, above the 100 of the best JPEG
# Quality of files with a palette: palette photographs lose detail; flat drawings, which do not, are exempt from
# near-duplicate search.
PALETTE = 50.0
# Bits of a JPEG file of the same quality, per bit of a file of this format.
_JPEG_BITS = {"WEBP": 1.4, "AVIF": 2.0}
_COARSE = 50.0  # JPEG quality below which an image has little more detail than one of half its sides


@dataclass
class _Survivors:
    """Records that passed all rules on single records, with the scores that rules on groups of records need."""

    kept: list[Kept] = field(default_factory=list)
    tags: list[list[str]] = field(default_factory=list)
    clusters: list[list[str]] = field(default_factory=list)
    bits: list[float] = field(default_factory=list)
    qualities: list[float] = field(default_factory=list)

    def add(self, row: Row, kept: Kept) -> None:
        self.kept.append(kept)
        self.tags.append(row["description.tags"])
        self.clusters.append([str(row["cluster.id"])])
        self.bits.append(row["entropy.bits"])
        self.qualities.append(copy_quality(row))

    def remaining(self, groups: list[list[str]], dropped: dict[str, Dropped]) -> dict[str, list[str]]:
        """Returns {key: groups} of the records that are not in `dropped`."""
        return {one.key: names for one, names in zip(self.kept, groups, strict=True) if one.key not in dropped}


def copy_quality(row: Row) -> float:
    """The quality by which copies of one image are compared, on the scale of libjpeg (1..100), or `LOSSLESS`.

    For lossy WebP and AVIF it is an estimate from the bits per pixel. On four photographs of scikit-image at qualities
    50 to 95, it was within 23 of the JPEG file with the same mean squared error, and within 10 for three of them.
    """
    if (quality := row["compression.jpeg_quality"]) is not None:
        return quality
    if not row["compression.lossless"]:
        bits = row["compression.bits_per_pixel"] * _JPEG_BITS.get(row["broken.format"], 1.0)
        return 100 * (1 - math.exp(-1.15 * bits))
    return PALETTE if row["broken.mode"] == "P" else LOSSLESS


def _detail(record: Kept, quality: float) -> float:
    """Pixels of a record; coarse files count a quarter, so an enlarged copy does not replace its original."""
    return record.width * record.height / (4 if quality < _COARSE else 1)


def select(folder: Path | str, thresholds: Thresholds = Thresholds(), *, without_captions: bool = False) -> Selection:
    """Applies thresholds to the scores of a folder; reads no images.

    Every step sees only the records that the steps before it kept. A broken or undersized copy therefore never
    displaces a good one.

    Args:
      folder: folder of scored records.
      thresholds: requirements of a stage.
      without_captions: whether to keep records without a usable caption, too, for the autoencoder.

    Raises:
      ValueError: if scores are missing (run `qi2 data score` first).
    """
    not_scored = _not_scored(folder, thresholds)
    trials, by = _trials(folder, thresholds), ALIGNMENTS[thresholds.alignment_by]
    cuts = find_cuts(folder, thresholds.min_alignment_percentile, thresholds.min_aesthetic_percentile, by)
    dropped: dict[str, Dropped] = {}
    survivors, colours, count = _Survivors(), Counter[str](), 0
    rules = {name: rule for name, rule in RULES.items() if name != CAPTIONS or not without_captions}
    for row in read_scores(folder, [filter for filter in (*CASCADE, *TRIALS) if filter is not DUPLICATES]):
        row[UNRELATED] = _unrelated(row, thresholds, cuts)
        row[LOWEST_AESTHETIC] = max(thresholds.min_aesthetic, cuts.aesthetic.get((class_of(row),), 0.0))
        if row["broken.colour"] is not None:
            colours[row["broken.colour"]] += 1
        reasons = ((name, rule(row, thresholds)) for name, rule in rules.items())
        failed = next(((name, reason) for name, reason in reasons if reason is not None), None)
        if failed:
            dropped[row["key"]] = Dropped(*failed)
        else:
            captions = tuple(i for i, reason in enumerate(caption_reasons(row, thresholds)) if reason is None)
            size = row["resolution.width"], row["resolution.height"]
            survivors.add(row, Kept(row["key"], count, *size, captions, row["description.conditions"]))
        count += 1
    late = _duplicates(folder, survivors.kept, survivors.qualities, np.array(survivors.bits, np.float64), thresholds)
    late |= _over_quota(survivors.remaining(survivors.tags, late), thresholds.max_per_class, "class_is_full")
    late |= _over_quota(survivors.remaining(survivors.clusters, late), thresholds.max_per_cluster, "cluster_is_full")
    dropped |= {key: late[key] for key in sorted(late)}
    kept = tuple(record for record in survivors.kept if record.key not in late)
    records = digest_of(read_manifest(folder))
    steps = _funnel(count, dropped)
    return Selection(thresholds, kept, dropped, steps, not_scored, trials, records, dict(sorted(colours.items())))


def _not_scored(folder: Path | str, thresholds: Thresholds) -> dict[str, str]:
    """Filters without scores, and what they need.

    Raises:
      ValueError: if the thresholds require scores of one of them.
    """
    not_scored = unscored(folder, CASCADE)
    if missing := {name: needs for name, needs in not_scored.items() if name in thresholds.require}:
        raise ValueError(
            f"{folder} lacks the scores required by data.thresholds.require: {missing}; score again, or require less"
        )
    if thresholds.max_per_cluster and CLUSTER.name in not_scored:
        raise ValueError(f"{folder}: max_per_cluster requires clusters, which were not scored: {CLUSTER.needs}")
    return not_scored


def _funnel(count: int, dropped: dict[str, Dropped]) -> tuple[Step, ...]:
    """The counts of all steps, for `count` records."""
    tallies = {name: Tally() for name in [*RULES, "duplicates", "distribution"]}
    for key, why in dropped.items():
        tallies[why.step].add(why.reason, key)
    steps = []
    for name, tally in tallies.items():
        steps.append(Step(name, count, tally))
        count -= tally.total
    return tuple(steps)


def _trials(folder: Path | str, thresholds: Thresholds) -> dict[str, str]:
    """How this selection uses the scores of each filter in `TRIALS`."""
    absent = unscored(folder, TRIALS)
    if needs := absent.get(thresholds.alignment_by):
        raise ValueError(f"{folder}: alignment_by names {thresholds.alignment_by}, which was not scored: {needs}")
    scored = [filter.name for filter in TRIALS if filter.name not in absent]
    decides = {thresholds.alignment_by: "DECIDES IN PLACE OF ALIGNMENT"}
    return {name: f"{decides.get(name, 'drops nothing')}, {CAVEAT}" for name in scored}


def _unrelated(row: Row, thresholds: Thresholds, cuts: Cuts) -> list[bool]:
    """For every caption, whether its alignment is too low. Instructions of edits do not describe their images."""
    cosines = row[f"{thresholds.alignment_by}.cosines"]
    if cosines is None or row["description.conditions"]:
        return [False] * len(row["description.kinds"])
    groups = ((language, class_of(row)) for language in row["description.languages"])
    lows = [max(thresholds.min_alignment, cuts.alignment.get(group, -1.0)) for group in groups]
    return [cosine < low for cosine, low in zip(cosines, lows, strict=True)]


def _over_quota(groups: dict[str, list[str]], limit: int, reason: str) -> dict[str, Dropped]:
    """Records beyond the first `limit` of a group, which are to be dropped; a pure function of keys and groups."""
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
    folder: Path | str,
    survivors: list[Kept],
    qualities: list[float],
    bits: Float[np.ndarray, " n"],
    thresholds: Thresholds,
) -> dict[str, Dropped]:
    """Records to drop for equal bytes, then for equal pixels, then for nearness among the rest.

    The best copy of each group is kept: the one with the most pixels (`_detail`), then the best quality, then the
    first key.
    """
    drops: dict[str, Dropped] = {}
    if not (thresholds.drop_exact_duplicates or thresholds.drop_near_duplicates):
        return drops
    pairs = read_pairs(folder)

    def rank(position: int) -> tuple[float, float, str]:
        record = survivors[position]
        return -_detail(record, qualities[position]), -qualities[position], record.key

    remaining = np.array(sorted(range(len(survivors)), key=rank), np.int64)
    record = np.array([survivor.index for survivor in survivors], np.int64)

    def keep_best(reason: str, group: Int64[np.ndarray, " n"]) -> None:
        nonlocal remaining
        _, best, member = np.unique(group, return_index=True, return_inverse=True)
        best = best[member]  # `remaining` is sorted: the first of a group is its best
        for position in np.flatnonzero(best != np.arange(len(remaining))):
            kept = survivors[remaining[best[position]]].key
            drops[survivors[remaining[position]].key] = Dropped("duplicates", reason, kept)
        remaining = remaining[best == np.arange(len(remaining))]

    if thresholds.drop_exact_duplicates:
        for name in ("bytes", "pixels"):
            keep_best(f"same_{name}", pairs.same[record[remaining], SAME.index(name)])
    if thresholds.drop_near_duplicates:
        near = pairs.near
        proposed = (near["distance"] <= thresholds.near_distance) | (near["gradient"] <= thresholds.near_gradient)
        near = near[proposed & (near["difference"] <= thresholds.near_difference)]
        content = pairs.same[record[remaining], SAME.index("fingerprints")]
        grouped = bits[remaining] >= thresholds.near_min_entropy
        keep_best("near", group_near(content, grouped, near["left"], near["right"]))
    for key, why in drops.items():  # a copy of a dropped copy names the record that was kept
        while why.duplicate_of in drops:
            why = Dropped(why.step, why.reason, drops[why.duplicate_of].duplicate_of)
        drops[key] = why
    return drops
