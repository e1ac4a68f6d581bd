"""Exemptions that several filters share."""

from data_pipeline.filters.base import Exemption, Row, Settings

SYNTHETIC = "synthetic/"
DESIGN_TAGS = (SYNTHETIC, "design/")  # tags of pages, slides and posters, which have margins on purpose


def is_flat(row: Row, settings: Settings) -> bool:
    """Whether an image is flat by nature, such as a drawing or a page of text."""
    return row["entropy.bits"] < settings.near_min_entropy


def is_design(row: Row, settings: Settings) -> bool:
    return any(tag.startswith(DESIGN_TAGS) for tag in row["description.tags"])


FLAT = Exemption("flat images (below `near_min_entropy` bits)", is_flat)
DESIGN = Exemption("records tagged `design/..` or `synthetic/..`", is_design)
