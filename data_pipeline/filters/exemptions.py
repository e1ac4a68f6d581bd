"""Exemptions that several filters share."""

from data_pipeline.filters.base import Chosen, Exemption, Row

SYNTHETIC = "synthetic/"
DESIGN_TAGS = (SYNTHETIC, "design/")  # tags of pages, slides and posters, whose margins belong to them


def is_flat(row: Row, chosen: Chosen) -> bool:
    """Whether an image is flat by design, as drawings and pages of text are."""
    return row["entropy.bits"] < chosen.near_min_entropy


def is_design(row: Row, chosen: Chosen) -> bool:
    return any(tag.startswith(DESIGN_TAGS) for tag in row["description.tags"])


FLAT = Exemption("flat images (below `near_min_entropy` bits)", is_flat)
DESIGN = Exemption("records tagged `design/..` or `synthetic/..`", is_design)
