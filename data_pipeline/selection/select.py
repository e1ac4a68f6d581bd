"""Selection: thresholds turn scores into the list of kept records. A cheap second step: no image is read."""

import hashlib
from collections import Counter
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int64

from data_pipeline.filters import CASCADE, TRIALS
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
from data_pipeline.selection.rules import LOWEST_AESTHETIC, RULES, UNRELATED, caption_reasons
from data_pipeline.selection.thresholds import ALIGNMENTS, Thresholds

LOSSLESS = 101.0  # quality of files that are no JPEG, above the 100 of the best JPEG


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
    qualities: list[float] = []

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
            qualities.append(row["compression.jpeg_quality"] or LOSSLESS)
        count += 1
    late = _duplicates(folder, survivors, qualities, np.array(bits, np.float64), thresholds)
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
    folder: Path | str,
    survivors: list[Kept],
    qualities: list[float],
    bits: Float[np.ndarray, " n"],
    thresholds: Thresholds,
) -> dict[str, Dropped]:
    """Which keys to drop: for the same bytes, then the same pixels, then nearness among those that are left.

    The best copy of each group is kept: the one with most pixels, then the best quality, then the first key.
    """
    drops: dict[str, Dropped] = {}
    if not (thresholds.drop_exact_duplicates or thresholds.drop_near_duplicates):
        return drops
    pairs = read_pairs(folder)

    def rank(position: int) -> tuple[int, float, str]:
        record = survivors[position]
        return -record.width * record.height, -qualities[position], record.key

    left = np.array(sorted(range(len(survivors)), key=rank), np.int64)
    record = np.array([survivor.index for survivor in survivors], np.int64)

    def keep_best(reason: str, group: Int64[np.ndarray, " n"]) -> None:
        nonlocal left
        _, best, member = np.unique(group, return_index=True, return_inverse=True)
        best = best[member]  # `left` is sorted: the first of a group is its best
        for position in np.flatnonzero(best != np.arange(len(left))):
            kept = survivors[left[best[position]]].key
            drops[survivors[left[position]].key] = Dropped("duplicates", reason, kept)
        left = left[best == np.arange(len(left))]

    if thresholds.drop_exact_duplicates:
        for name in ("bytes", "pixels"):
            keep_best(f"same_{name}", pairs.same[record[left], SAME.index(name)])
    if thresholds.drop_near_duplicates:
        near = pairs.near
        proposed = (near["distance"] <= thresholds.near_distance) | (near["gradient"] <= thresholds.near_gradient)
        near = near[proposed & (near["difference"] <= thresholds.near_difference)]
        content = pairs.same[record[left], SAME.index("fingerprints")]
        keep_best("near", group_near(content, bits[left] >= thresholds.near_min_entropy, near["left"], near["right"]))
    for key, why in drops.items():  # the copy of a copy stands for the one that was kept
        while why.duplicate_of in drops:
            why = Dropped(why.step, why.reason, drops[why.duplicate_of].duplicate_of)
        drops[key] = why
    return drops
