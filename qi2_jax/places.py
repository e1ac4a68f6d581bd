"""Names of the files and folders of runs, jobs and curricula (see `qi2_jax.runs`): importable without JAX."""

import pathlib

from qi2_jax.training import checkpoint_files

CONFIG, MODEL, CHECKPOINTS = "config.json", "model", "checkpoints"
JOB, TRANSFORMER = "job.json", "transformer"
CURRICULUM, STAGES = "curriculum.json", "stages"


def run_of(path: pathlib.Path) -> pathlib.Path:
    """The run of a job, or of the latest stage of a curriculum that has a checkpoint; any other path as it is."""
    if (path / JOB).is_file():
        return path / TRANSFORMER
    if (path / CURRICULUM).is_file():
        runs = (stage / TRANSFORMER for stage in sorted((path / STAGES).glob("*"), reverse=True))
        return next((run for run in runs if checkpoint_files.steps(run / CHECKPOINTS)), path)
    return path
