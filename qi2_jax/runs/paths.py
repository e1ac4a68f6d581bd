"""Names of the files and folders of runs, jobs and curricula (see `qi2_jax.runs`): importable without JAX."""

import pathlib
from collections.abc import Mapping
from typing import Any

from qi2_jax.config import recorded
from qi2_jax.training.checkpoints import files

CONFIG, MODEL, CHECKPOINTS = "config.json", "model", "checkpoints"
START_LORA = "start_lora"
JOB, TRANSFORMER = "job.json", "transformer"
CURRICULUM, STAGES, CORPUS, VAE, SAMPLES = "curriculum.json", "stages", "corpus", "vae", "samples"


def order_of(path: pathlib.Path) -> list[str]:
    """The stages of a curriculum in training order; empty if the folder is not a curriculum.

    Raises:
      ValueError: if the record of the curriculum is damaged.
    """
    if not (path / CURRICULUM).is_file():
        return []
    return ordered(recorded.read(path / CURRICULUM))


def ordered(record: Mapping[str, Any]) -> list[str]:
    """The stages in the record of a curriculum, in training order."""
    order, stages = record.get("order"), record.get("stages", {})
    if not isinstance(stages, dict) or not isinstance(order, (list, type(None))):
        raise ValueError(f"{CURRICULUM} is damaged: its order is {order!r} of {stages!r}; restore it from a copy")
    return [str(name) for name in order or sorted(stages)]  # earlier versions trained in the order of the names


def run_of(path: pathlib.Path) -> pathlib.Path:
    """The run of a job, or of the last stage of a curriculum with a checkpoint; other paths are returned unchanged."""
    if (path / JOB).is_file():
        return path / TRANSFORMER
    stages = (path / STAGES / name / TRANSFORMER for name in reversed(order_of(path)))
    return next((stage for stage in stages if files.steps(stage / CHECKPOINTS)), path)
