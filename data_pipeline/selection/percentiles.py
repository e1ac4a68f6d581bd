"""Thresholds from percentiles: the lowest percentage of each group is dropped, whatever the scale of the scores.

Scores of different models, languages and kinds of images are not comparable. An aesthetic head rates posters lower than
portraits, and a CLIP rates captions lower in languages that are rare in its training data. Captions are therefore
compared within their language and class, and images within their class. The class is the first part of a record's first
tag: `design` for `design/slide`, None without tags.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipeline.filters.aesthetic import AESTHETIC
from data_pipeline.filters.alignment import ALIGNMENT
from data_pipeline.filters.base import Filter
from data_pipeline.filters.description import DESCRIPTION
from data_pipeline.scoring.score_tables import read_scores

Group = tuple[str | None, ...]  # (language, class) for captions, (class,) for images


@dataclass(frozen=True)
class Cuts:
    """The lowest score that is kept in each group; groups without an entry have no requirement."""

    alignment: dict[Group, float]
    aesthetic: dict[Group, float]


def class_of(row: dict) -> str | None:
    """The class of a record, from its row of scores."""
    return row["description.tags"][0].split("/")[0] if row["description.tags"] else None


def find_cuts(folder: Path | str, alignment: float, aesthetic: float, by: Filter = ALIGNMENT) -> Cuts:
    """Reads the scores once and computes the cut of every group, for percentages above 0.

    Args:
      folder: folder of scored records.
      alignment: percentage of captions below the cut in each language and class. Edits do not count, because their
        instructions do not describe their images.
      aesthetic: percentage of images below the cut in each class.
      by: filter whose cosines are used as alignment.

    Raises:
      ValueError: if the scores are missing.
    """
    captions: dict[Group, list[float]] = {}
    images: dict[Group, list[float]] = {}
    if alignment or aesthetic:
        for row in read_scores(folder, (DESCRIPTION, by, AESTHETIC)):
            if not row["description.conditions"]:
                cosines = row[f"{by.name}.cosines"] or ()
                for language, cosine in zip(row["description.languages"], cosines, strict=False):
                    captions.setdefault((language, class_of(row)), []).append(cosine)
            if row["aesthetic.score"] is not None:
                images.setdefault((class_of(row),), []).append(row["aesthetic.score"])
    return Cuts(_cut(folder, ALIGNMENT, captions, alignment), _cut(folder, AESTHETIC, images, aesthetic))


def _cut(folder: Path | str, filter: Filter, groups: dict[Group, list[float]], percentage: float) -> dict[Group, float]:
    if percentage and not groups:
        raise ValueError(
            f"{folder}: min_{filter.name}_percentile is {percentage}, but {filter.name} was not scored: {filter.needs}"
        )
    return {group: float(np.percentile(values, percentage)) for group, values in groups.items()} if percentage else {}
