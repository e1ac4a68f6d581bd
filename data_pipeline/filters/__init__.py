"""The filters in the order in which they are asked and applied, cheapest first."""

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
)

__all__ = ["CASCADE", "Candidate", "Filter"]
