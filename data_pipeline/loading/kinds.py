"""Kinds of images, such as photographs and pages of text, by the labels of their records.

The labels of a record are its tags and `source/NAME`, where NAME is its data set.
"""

from collections.abc import Mapping, Sequence

from data_pipeline.filters.description import DESCRIPTION
from data_pipeline.loading.crops import SelectedImages
from data_pipeline.scoring.score_tables import read_scores

SOURCE_LABEL = "source/"
Kinds = Mapping[str, Sequence[str]]  # name of a kind -> beginnings of labels; none: images of no other kind


def check_kinds(kinds: Kinds) -> None:
    """Raises a ValueError if a label would belong to two kinds, or a beginning is repeated."""
    owners: dict[str, str] = {}
    for name, prefixes in kinds.items():
        for prefix in prefixes or ("",):
            if owners.get(prefix) == name:
                raise ValueError(f"kind {name!r} has the beginning {prefix!r} twice; leave one of them out")
            if prefix in owners:
                what = f"labels that begin with {prefix!r}" if prefix else "images of no other kind"
                raise ValueError(f"kinds {owners[prefix]!r} and {name!r} both have {what}; leave one of them out")
            owners[prefix] = name


def kind_of(labels: Sequence[str], kinds: Kinds) -> str | None:
    """The kind with the longest beginning of one of the labels; None if there is none.

    Args:
      labels: labels of a record.
      kinds: kinds that `check_kinds` accepts.
    """
    found = [
        (len(prefix), prefix, name)
        for name, prefixes in kinds.items()
        for prefix in prefixes or ("",)
        if not prefix or any(label.startswith(prefix) for label in labels)
    ]
    return max(found)[2] if found else None


def split_by_kind(images: SelectedImages, kinds: Kinds) -> dict[str, list[int]]:
    """Positions of the images of each kind; images of no kind are in none.

    Args:
      images: selected images, whose records are scored.
      kinds: kinds that `check_kinds` accepts.

    Raises:
      ValueError: if the records are not scored.
    """
    if not kinds:
        return {"": [*range(len(images))]}
    position = {image.index: number for number, image in enumerate(images.chosen)}
    found: dict[str, list[int]] = {name: [] for name in kinds}
    for index, row in enumerate(read_scores(images.records.folder, (DESCRIPTION,))):
        if index in position:
            labels = [*row["description.tags"], SOURCE_LABEL + row["description.source"]]
            if (kind := kind_of(labels, kinds)) is not None:
                found[kind].append(position[index])
    return found
