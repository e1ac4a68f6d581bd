"""Aesthetics: a head like LAION's, a chain of linear layers on CLIP's image embedding, from a safetensors file.

LAION's scores range from 1 to 10, and its data sets use thresholds of 4.5, 5 or 6. A head fits only the CLIP that it
was trained on; LAION's needs ViT-L/14.
"""

import functools
import hashlib
import itertools
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from data_pipeline.filters.alignment import embed_images, model_digest, no_model
from data_pipeline.filters.base import Candidate, Filter, Row, Settings, Threshold

MAX_HEAD_BYTES = 64 << 20
LOWEST_AESTHETIC = "aesthetic.lowest"  # entry of a record's row: the lowest score that is kept in its class


def with_head(filter: Filter, clip: Path | str, head: Path | str) -> Filter:
    """Returns the filter with a CLIP from a folder and a head from a file.

    Raises:
      ValueError: if either cannot be read, or the head does not map the embeddings of this CLIP to one number.
    """
    clip, head = Path(clip).resolve(), Path(head).resolve()
    layers = _load(head)
    width = embed_images(clip, ()).shape[1]
    if layers[0][0].shape[1] != width or layers[-1][0].shape[0] != 1:
        raise ValueError(
            f"{head} has layers {[w.shape for w, _ in layers]}; the embeddings of {clip} have width {width}"
        )
    digest = hashlib.sha256(model_digest(clip).encode() + head.read_bytes()).hexdigest()
    return replace(filter, model=digest, score=functools.partial(score, clip, head))


def score(clip: Path, head: Path, candidates: Sequence[Candidate]) -> list[dict]:
    """Columns of `AESTHETIC` for each candidate."""
    x = embed_images(clip, candidates)
    for weight, bias in _load(head):
        x = x @ weight.T + bias
    return [{"score": round(float(value), 3)} for value in x[:, 0]]


@functools.cache
def _load(head: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    """Weights and biases of the linear layers, sorted by the numbers in their names."""
    import safetensors.numpy
    from safetensors import SafetensorError

    if not head.is_file() or head.stat().st_size > MAX_HEAD_BYTES:
        raise ValueError(f"{head} is not a file of at most {MAX_HEAD_BYTES} bytes")
    try:
        tensors = safetensors.numpy.load_file(head)
    except SafetensorError as error:
        raise ValueError(f"{head} is not a safetensors file: {error}") from None
    names = sorted(
        (name.removesuffix(".weight") for name in tensors if name.endswith(".weight")),
        key=lambda name: [int(number) for number in re.findall(r"\d+", name)],
    )
    layers = [(tensors[f"{name}.weight"], tensors.get(f"{name}.bias")) for name in names]
    chained = all(a.ndim == b.ndim == 2 and a.shape[0] == b.shape[1] for (a, _), (b, _) in itertools.pairwise(layers))
    biased = all(bias is not None and bias.shape == weight.shape[:1] for weight, bias in layers)
    if not layers or len(tensors) != 2 * len(layers) or not chained or not biased or layers[0][0].ndim != 2:
        raise ValueError(f"{head} is not a chain of linear layers with biases: {sorted(tensors)}")
    return [(weight.astype(np.float32), bias.astype(np.float32)) for weight, bias in layers if bias is not None]


def _drops(row: Row, settings: Settings) -> str | None:
    value = row["aesthetic.score"]
    return "not_beautiful" if value is not None and value < row[LOWEST_AESTHETIC] else None


AESTHETIC = Filter(
    name="aesthetic",
    version=2,
    columns={"score": (float, "score of the head; LAION's ranges from 1 to 10, with ordinary images around 5")},
    score=no_model,
    thresholds=(
        Threshold(
            "min_aesthetic",
            0.0,
            "score of the head; 0: no requirement",
            low=0,
            high=100,
            column="score",
            by_group=True,
            reason="not_beautiful",
        ),
        Threshold(
            "min_aesthetic_percentile",
            0.0,
            "percentage of images with the lowest scores that is dropped in each class",
            low=0,
            high=100,
            reason="not_beautiful",
        ),
    ),
    drops=_drops,
    optional=True,
    on_device=True,
    needs="score with --clip FOLDER and --aesthetic FILE.safetensors, a head on its embeddings",
)
