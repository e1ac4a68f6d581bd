"""The table of a curriculum's stages, for the page of its runs."""

import contextlib
import pathlib
from dataclasses import dataclass

from data_pipeline.samples.cache import Cache
from qi2_jax.pages import Link
from qi2_jax.reporting.formats import is_number
from qi2_jax.reporting.run_files import MAX_JSON_BYTES, Run, read_json
from qi2_jax.runs import paths

HEAD = ["stage", "samples", "steps", "validation loss, before → after", "minutes of training", "state"]
ENCODED, FIGURES = "samples", "report.json"  # names in the folder of a stage and of a curriculum


@dataclass(frozen=True)
class Stages:
    """A table; cells are texts or links."""

    head: list[str]
    rows: list[list[str | Link]]


def stages_of(folder: pathlib.Path, runs: list[Run]) -> Stages | None:
    """All stages of the curriculum in `folder`, also those that have not begun; None if there is no curriculum."""
    try:
        names = paths.ordered(read_json(folder / paths.CURRICULUM, MAX_JSON_BYTES))
    except ValueError:
        return None
    begun = {run.folder.relative_to(folder).as_posix(): run for run in runs}
    rows = [_row(folder, name, begun.get(f"{paths.STAGES}/{name}/{paths.TRANSFORMER}")) for name in names]
    return Stages(HEAD, rows) if rows else None


def steps_of(run: Run) -> str:
    """The last step in the metrics of a run, and the number of steps in its config."""
    done, total = run.figures["step"] or 0, run.figures["steps"]
    return f"{done:,}" + (f" of {total:,}" if is_number(total) else "")


def _row(folder: pathlib.Path, name: str, run: Run | None) -> list[str | Link]:
    samples = _count_samples(folder, name)
    if run is None:
        return [name, samples, "–", "–", "–", "not begun"]
    losses, seconds = run.scan.curves.get("validation_loss"), run.figures["wall_seconds"]
    loss = "–" if losses is None else f"{losses.first:.3f} → {losses.last:.3f}"
    minutes = "–" if seconds is None else f"{seconds / 60:.1f}"
    return [Link(name, f"#{run.name}"), samples, steps_of(run), loss, minutes, run.figures["state"]]


def _count_samples(folder: pathlib.Path, name: str) -> str:
    """Number of samples of a stage: of its cache or, if that was deleted, from the figures of the curriculum."""
    with contextlib.suppress(ValueError, LookupError, TypeError, OSError):
        return f"{len(Cache(folder / paths.STAGES / name / ENCODED)):,}"
    with contextlib.suppress(ValueError, LookupError, TypeError):
        return f"{int(read_json(folder / FIGURES, MAX_JSON_BYTES)['stages'][name]['samples']):,}"
    return "–"
