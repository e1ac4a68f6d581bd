"""The filters in the order in which they are asked and applied, cheapest first."""

from pathlib import Path

from data_pipeline.filters.aesthetic import AESTHETIC, with_head
from data_pipeline.filters.alignment import ALIGNMENT, with_model
from data_pipeline.filters.base import Candidate, Filter
from data_pipeline.filters.border import BORDER
from data_pipeline.filters.broken import BROKEN
from data_pipeline.filters.caption_length import CAPTION_LENGTH
from data_pipeline.filters.compression import COMPRESSION
from data_pipeline.filters.description import DESCRIPTION
from data_pipeline.filters.duplicates import DUPLICATES
from data_pipeline.filters.entropy import ENTROPY
from data_pipeline.filters.nsfw import NSFW
from data_pipeline.filters.orientation import ORIENTATION
from data_pipeline.filters.quality import QUALITY
from data_pipeline.filters.resolution import RESOLUTION

CASCADE = (
    DESCRIPTION,
    BROKEN,
    ORIENTATION,
    RESOLUTION,
    DUPLICATES,
    ENTROPY,
    CAPTION_LENGTH,
    COMPRESSION,
    QUALITY,
    BORDER,
    NSFW,
    ALIGNMENT,
    AESTHETIC,
)


def cascade(clip: Path | None = None, aesthetic: Path | None = None) -> tuple[Filter, ...]:
    """`CASCADE` with the models that the user has.

    Args:
      clip: folder of a CLIP or SigLIP for `alignment`.
      aesthetic: safetensors file of a head on its embeddings.

    Raises:
      ValueError: if a folder does not hold such a model.
    """
    if aesthetic is not None and clip is None:
        raise ValueError(f"{aesthetic} is a head on the embeddings of a CLIP, whose folder is missing")
    given = {}
    if clip is not None:
        given[ALIGNMENT.name] = with_model(ALIGNMENT, clip)
        if aesthetic is not None:
            given[AESTHETIC.name] = with_head(AESTHETIC, clip, aesthetic)
    return tuple(given.get(filter.name, filter) for filter in CASCADE)


__all__ = ["CASCADE", "Candidate", "Filter", "cascade"]
