"""All filters, in the order in which they score and in which selection applies them."""

from pathlib import Path

from data_pipeline.filters.aesthetic import AESTHETIC, with_head
from data_pipeline.filters.alignment import ALIGNMENT, with_model
from data_pipeline.filters.base import Filter
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
    BROKEN,
    DESCRIPTION,
    ORIENTATION,
    RESOLUTION,
    DUPLICATES,
    ENTROPY,
    CAPTION_LENGTH,
    INSTRUCTION_TEXT,
    EDIT_PAIR,
    QUALITY,
    COMPRESSION,
    BORDER,
    WATERMARK,
    NSFW,
    ALIGNMENT,
    AESTHETIC,
    CLUSTER,
)
TRIALS = (LABEL_ALIGNMENT,)  # substitutes for a filter without a model, used if a config names them


def cascade(
    clip: Path | None = None,
    aesthetic: Path | None = None,
    centroids: Path | None = None,
    labels: Path | None = None,
) -> tuple[Filter, ...]:
    """`CASCADE` with the user's models, followed by the trial filters with a model.

    Args:
      clip: folder of a CLIP or SigLIP for `alignment`.
      aesthetic: safetensors file of a head on the embeddings of this CLIP.
      centroids: file that `cluster.fit_centroids` wrote for this CLIP.
      labels: folder that `qi2_torch.efficientnet_lite` wrote, for `label_alignment`.

    Raises:
      ValueError: if a folder does not contain such a model.
    """
    if aesthetic is not None and clip is None:
        raise ValueError(f"{aesthetic} is a head on the embeddings of a CLIP, so --clip FOLDER is required")
    if centroids is not None and clip is None:
        raise ValueError(f"{centroids} were fitted on the embeddings of a CLIP, so --clip FOLDER is required")
    models = {}
    if clip is not None:
        models[ALIGNMENT.name] = with_model(ALIGNMENT, clip)
        if aesthetic is not None:
            models[AESTHETIC.name] = with_head(AESTHETIC, clip, aesthetic)
        if centroids is not None:
            models[CLUSTER.name] = with_centroids(CLUSTER, clip, centroids)
    trials = () if labels is None else (with_labels(LABEL_ALIGNMENT, labels),)
    return (*(models.get(filter.name, filter) for filter in CASCADE), *trials)
