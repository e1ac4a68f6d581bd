"""The filters in the order in which they are asked and applied, cheapest first."""

from pathlib import Path

from data_pipeline.filters.aesthetic import AESTHETIC, with_head
from data_pipeline.filters.alignment import ALIGNMENT, with_model
from data_pipeline.filters.base import Candidate, Filter
from data_pipeline.filters.border import BORDER
from data_pipeline.filters.broken import BROKEN
from data_pipeline.filters.caption_length import CAPTION_LENGTH
from data_pipeline.filters.cluster import CLUSTER, with_centroids
from data_pipeline.filters.compression import COMPRESSION
from data_pipeline.filters.description import DESCRIPTION
from data_pipeline.filters.duplicates import DUPLICATES
from data_pipeline.filters.edit_pair import EDIT_PAIR
from data_pipeline.filters.entropy import ENTROPY
from data_pipeline.filters.instruction import INSTRUCTION_TEXT
from data_pipeline.filters.label_alignment import LABEL_ALIGNMENT, with_labels
from data_pipeline.filters.nsfw import NSFW
from data_pipeline.filters.orientation import ORIENTATION
from data_pipeline.filters.quality import QUALITY
from data_pipeline.filters.resolution import RESOLUTION
from data_pipeline.filters.watermark import WATERMARK

CASCADE = (
    DESCRIPTION,
    BROKEN,
    ORIENTATION,
    RESOLUTION,
    DUPLICATES,
    ENTROPY,
    CAPTION_LENGTH,
    INSTRUCTION_TEXT,
    COMPRESSION,
    QUALITY,
    BORDER,
    EDIT_PAIR,
    WATERMARK,
    NSFW,
    ALIGNMENT,
    AESTHETIC,
    CLUSTER,
)
TRIALS = (LABEL_ALIGNMENT,)  # stand in for a filter whose model is absent; asked and believed only when named


def cascade(
    clip: Path | None = None,
    aesthetic: Path | None = None,
    centroids: Path | None = None,
    labels: Path | None = None,
) -> tuple[Filter, ...]:
    """`CASCADE` with the models that the user has, and at its end what stands in for others.

    Args:
      clip: folder of a CLIP or SigLIP for `alignment`.
      aesthetic: safetensors file of a head on its embeddings.
      centroids: file that `cluster.fit_centroids` wrote for it.
      labels: folder that `qi2_torch.efficientnet_lite` wrote, for `label_alignment`.

    Raises:
      ValueError: if a folder does not hold such a model.
    """
    if aesthetic is not None and clip is None:
        raise ValueError(f"{aesthetic} is a head on the embeddings of a CLIP, whose folder is missing")
    if centroids is not None and clip is None:
        raise ValueError(f"{centroids} were fitted on the embeddings of a CLIP, whose folder is missing")
    given = {}
    if clip is not None:
        given[ALIGNMENT.name] = with_model(ALIGNMENT, clip)
        if aesthetic is not None:
            given[AESTHETIC.name] = with_head(AESTHETIC, clip, aesthetic)
        if centroids is not None:
            given[CLUSTER.name] = with_centroids(CLUSTER, clip, centroids)
    trials = () if labels is None else (with_labels(LABEL_ALIGNMENT, labels),)
    return (*(given.get(filter.name, filter) for filter in CASCADE), *trials)


__all__ = ["CASCADE", "TRIALS", "Candidate", "Filter", "cascade"]
