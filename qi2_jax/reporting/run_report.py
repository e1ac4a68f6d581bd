"""The page of `qi2 report`: one run, or all runs of a job or a curriculum, with curves, events, samples and config."""

import json
import pathlib
from typing import Any

from qi2_jax.pages import render
from qi2_jax.reporting import panels
from qi2_jax.reporting.charts import chart
from qi2_jax.reporting.curves import Curve
from qi2_jax.reporting.events import events_of, facts_of
from qi2_jax.reporting.formats import duration, moment, number_or_dash, percent_or_dash
from qi2_jax.reporting.run_files import Run, find_runs
from qi2_jax.reporting.samples import find_samples
from qi2_jax.reporting.stages import stages_of, steps_of
from qi2_jax.runtime.atomic import write_atomic
from qi2_jax.training.telemetry import metrics, sinks


def write_report(path: pathlib.Path, folder: pathlib.Path) -> list[dict[str, Any]]:
    """Writes the page of every run in `folder`, in the order in which they were started.

    Args:
      path: HTML file.
      folder: run, or a folder with runs below it.

    Returns:
      `Run.figures` of each run.

    Raises:
      ValueError: if there is no run.
    """
    runs = [Run(run, _name(run, folder)) for run in find_runs(folder)]
    if not runs:
        raise ValueError(f"no runs found in {folder}: neither it nor a folder below it has a {metrics.FILE}")
    runs.sort(key=lambda run: run.begun)
    page = render(
        "run.html",
        title=f"{folder.resolve().name} – qi2 report",
        stages=stages_of(folder, runs),
        runs=[_section(run, path.parent) for run in runs],
    )
    write_atomic(path, page.encode(errors="replace"))  # JSON may contain surrogates, which UTF-8 cannot encode
    return [run.figures for run in runs]


def _name(run: pathlib.Path, folder: pathlib.Path) -> str:
    return run.resolve().name if run == folder else run.relative_to(folder).as_posix()


def _section(run: Run, page_folder: pathlib.Path) -> dict[str, Any]:
    """The values of a run that the template shows."""
    restarts = [event["step"] for event in run.starts[1:] if isinstance(event.get("step"), (int, float))]
    return {
        "name": run.name,
        "facts": facts_of(run.last_start, " · "),
        "times": f"started {moment(run.begun)}, last sign of life {moment(run.last_seen)}",
        "tiles": _tiles(run),
        "sections": _charts(run.scan.curves, restarts),
        "samples": find_samples(run.folder / sinks.SAMPLES, page_folder),
        "events": events_of(run.events),
        "config": json.dumps(run.config, indent=2, ensure_ascii=False) if run.config else "",
    }


def _tiles(run: Run) -> dict[str, str]:
    figures, last = run.figures, run.figures["last"]
    skipped = figures["skipped_steps"]
    return {
        "state": figures["state"],
        "step": steps_of(run),
        "loss": number_or_dash(last.get("loss")),
        "validation loss": number_or_dash(last.get("validation_loss")),
        "wall time": duration(figures["wall_seconds"]),
        "goodput": percent_or_dash(figures["goodput"]),
        "images/s": number_or_dash(last.get("images_per_second")),
        "MFU": percent_or_dash(last.get("mfu")),
        "skipped steps": "–" if skipped is None else f"{skipped:.0f}",
        "restarts": str(figures["restarts"]),
    }


def _charts(curves: dict[str, Curve], restarts: list[float]) -> dict[str, list[dict[str, Any]]]:
    """Panels of all sections, over the same steps."""
    spans = [curve.span for curve in curves.values()]
    span = min((first for first, _ in spans), default=0.0), max((last for _, last in spans), default=0.0)
    return {
        section: [
            {"title": panel.title, "note": panel.note, "chart": chart(panel.lines, span, restarts)} for panel in some
        ]
        for section, some in panels.sections(curves).items()
    }
