"""The filters in the order in which they are asked and applied, cheapest first."""

from data_pipeline.filters.base import Candidate, Filter
from data_pipeline.filters.broken import BROKEN
from data_pipeline.filters.duplicates import DUPLICATES
from data_pipeline.filters.orientation import ORIENTATION
from data_pipeline.filters.resolution import RESOLUTION

CASCADE = (BROKEN, ORIENTATION, RESOLUTION, DUPLICATES)

__all__ = ["CASCADE", "Candidate", "Filter"]
