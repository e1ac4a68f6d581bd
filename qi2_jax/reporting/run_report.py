"""One page about a run, or about all runs of a job or a curriculum: curves, events, samples, config."""

import contextlib
import datetime
import html
import json
import math
import os
import pathlib
from collections import Counter
from typing import Any

from data_pipeline.samples.cache import Cache
from qi2_jax.reporting import curves, page
from qi2_jax.reporting.charts import number
from qi2_jax.reporting.page import text
from qi2_jax.runs import paths
from qi2_jax.runtime.atomic import write_atomic
from qi2_jax.training.telemetry import accounting, metrics, sinks

NOT_RUNS = {"checkpoints", "model", sinks.SAMPLES, sinks.TENSORBOARD, "wandb", "profile", "records"}

ROUTINE = {accounting.SAVE, accounting.COMMIT, accounting.EVALUATE, accounting.SAMPLE, accounting.COMPILE}

ENCODED, FIGURES = "samples", "report.json"  # of a stage, and of a curriculum (`qi2_jax.workflows.curriculum`)

MAX_EVENTS = 200  # shown one by one

MAX_TEXT = 300  # characters of an event's facts

MAX_CONFIG = 1 << 20  # bytes, of each other JSON file, too


def write_report(path: pathlib.Path, folder: pathlib.Path) -> list[dict[str, Any]]:
    """Writes the page about every run in `folder`, in the order in which they were started.

    Returns:
      `Run.figures` of each.

    Raises:
      ValueError: if there is no run.
    """
    found = [Run(run, _name(run, folder)) for run in find_runs(folder)]
    if not found:
        raise ValueError(f"{folder} is no run and has none below it: no {metrics.FILE} was found")
    found.sort(key=lambda run: run.begun)
    body = [_section(run, path) for run in found]
    contents = "".join(f'<a href="#{text(run.name)}">{text(run.name)}</a>' for run in found) if len(found) > 1 else ""
    title = folder.resolve().name
    whole = page.page(title, contents + _stages(folder, found) + "\n".join(body))
    write_atomic(path, whole.encode(errors="replace"))  # JSON may hold what UTF-8 cannot
    return [run.figures for run in found]


def find_runs(folder: pathlib.Path) -> list[pathlib.Path]:
    """Folders with metrics, `folder` among them; links to folders are not followed."""
    found = []
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if name not in NOT_RUNS and not name.startswith("."))
        if metrics.FILE in files:
            found.append(pathlib.Path(place))
    return found


def _name(run: pathlib.Path, folder: pathlib.Path) -> str:
    return run.resolve().name if run == folder else run.relative_to(folder).as_posix()


class Run:
    """What the files of a run say."""

    def __init__(self, folder: pathlib.Path, name: str):
        self.folder, self.name = folder, name
        self.scan = curves.scan(folder / metrics.FILE)
        self.events = accounting.read_events(folder / accounting.EVENTS)
        self.config = page.read_json(folder / paths.CONFIG, MAX_CONFIG)
        # Without an end in the events, the last sign of life is the last line of metrics.
        self.seen = max([(folder / metrics.FILE).stat().st_mtime, *(event["time"] for event in self.events)])
        self.begun = min([event["time"] for event in self.events], default=self.seen)
        self.starts = [event for event in self.events if event["event"] == accounting.START]
        self.figures = self._figures()

    def _figures(self) -> dict[str, Any]:
        """Figures of the page, for JSON: None where the files do not tell."""
        found, kinds = self.scan, Counter(str(event["event"]) for event in self.events)
        wall = accounting.wall_seconds(self.events, self.seen)
        start = self.starts[-1] if self.starts else {}
        train = self.config.get("train")
        validation = found.curves.get("validation_loss")
        return {
            "run": self.name,
            "name": start.get("name"),
            "commit": start.get("commit"),
            "state": _state(self.events),
            "step": found.step,
            "steps": train.get("steps") if isinstance(train, dict) else None,
            "wall_seconds": wall,
            "goodput": None if wall is None else found.kept_seconds / max(wall, 1e-9),
            "restarts": max(0, len(self.starts) - 1),
            "skipped_steps": None if "skipped_total" not in found.curves else found.curves["skipped_total"].last,
            "events": dict(kinds),
            "lowest_validation_loss": None if validation is None else validation.low,
            "last": {name: curve.last for name, curve in found.curves.items()},
        }


def _stages(folder: pathlib.Path, runs: list[Run]) -> str:
    """A table of the stages of a curriculum, as far as it has come; nothing of another folder."""
    try:
        names = paths.ordered(page.read_json(folder / paths.CURRICULUM, MAX_CONFIG))
    except ValueError:
        return ""
    if not names:
        return ""
    begun = {run.folder.relative_to(folder).as_posix(): run for run in runs}
    rows = []
    for name in names:
        row = [text(name), _encoded(folder, name), "–", "–", "–", "not begun"]
        if run := begun.get(f"{paths.STAGES}/{name}/{paths.TRANSFORMER}"):
            figures, losses = run.figures, run.scan.curves.get("validation_loss")
            row[0] = f'<a href="#{text(run.name)}">{text(name)}</a>'
            row[2:] = [_steps(figures), *row[3:5], text(figures["state"])]
            if losses is not None:
                row[3] = f"{losses.first:.3f} → {losses.last:.3f}"
            if figures["wall_seconds"] is not None:
                row[4] = f"{figures['wall_seconds'] / 60:.1f}"
        rows.append(row)
    head = ["stage", "samples", "steps", "validation loss, before → after", "minutes of training", "state"]
    return f"<h2>Stages</h2>{page.table(head, rows)}"


def _encoded(folder: pathlib.Path, name: str) -> str:
    """How many samples a stage has, of its cache or, where that was removed, of the curriculum's own figures."""
    with contextlib.suppress(ValueError, LookupError, TypeError, OSError):
        return f"{len(Cache(folder / paths.STAGES / name / ENCODED)):,}"
    with contextlib.suppress(ValueError, LookupError, TypeError):
        return f"{int(page.read_json(folder / FIGURES, MAX_CONFIG)['stages'][name]['samples']):,}"
    return "–"


def _steps(figures: dict[str, Any]) -> str:
    """The last step that metrics tell of, and how many there are to be."""
    return f"{figures['step'] or 0:,}" + (f" of {figures['steps']:,}" if _is_number(figures["steps"]) else "")


def _state(events: list[dict[str, Any]]) -> str:
    last = [event for event in events if event["event"] not in ROUTINE][-1:]
    if not last:
        return "unknown"
    if last[0]["event"] == accounting.END:
        return "finished"
    if last[0]["event"] == accounting.SIGTERM:
        return "stopped by SIGTERM, can be continued"
    if last[0]["event"] == accounting.ERROR:
        return f"failed: {str(last[0].get('message', 'no message'))[:MAX_TEXT]}"
    return "running, or killed"


def _section(run: Run, path: pathlib.Path) -> str:
    restarts = [event["step"] for event in run.starts[1:] if isinstance(event.get("step"), (int, float))]
    parts = [f'<section id="{text(run.name)}"><h1>{text(run.name)}</h1>', _head(run)]
    parts.append(page.panels(run.scan.curves, restarts))
    parts.append(page.samples(run.folder / sinks.SAMPLES, path.parent))
    parts.append(_events(run.events))
    if run.config:
        pretty = html.escape(json.dumps(run.config, indent=2, ensure_ascii=False))
        parts.append(f"<details><summary>Config</summary><pre>{pretty}</pre></details>")
    return "\n".join([*parts, "</section>"])


def _head(run: Run) -> str:
    figures, last = run.figures, run.figures["last"]
    start = run.starts[-1] if run.starts else {}
    told = {key: value for key, value in start.items() if key not in ("time", "event", "step", "seconds")}
    facts = " · ".join(f"{text(key)} {text(str(value)[:MAX_TEXT])}" for key, value in told.items() if value is not None)
    tiles = {
        "state": figures["state"],
        "step": _steps(figures),
        "loss": _shown(last.get("loss")),
        "validation loss": _shown(last.get("validation_loss")),
        "wall time": _duration(figures["wall_seconds"]),
        "goodput": "–" if figures["goodput"] is None else f"{figures['goodput']:.1%}",
        "images/s": _shown(last.get("images_per_second")),
        "MFU": "–" if "mfu" not in last else f"{last['mfu']:.1%}",
        "skipped steps": "–" if figures["skipped_steps"] is None else f"{figures['skipped_steps']:.0f}",
        "restarts": str(figures["restarts"]),
    }
    boxes = "".join(f"<div><small>{name}</small>{text(value)}</div>" for name, value in tiles.items())
    times = f"started {_moment(run.begun)}, last sign of life {_moment(run.seen)}"
    return f'<p class="facts">{facts}<br>{times}</p><div class="tiles">{boxes}</div>'


def _events(events: list[dict[str, Any]]) -> str:
    """Two tables: how often what happened, and what is not routine one by one."""
    if not events:
        return ""
    rows = []
    for kind, count in Counter(str(event["event"]) for event in events).most_common():
        ours = [event for event in events if str(event["event"]) == kind]
        seconds = sum(event["seconds"] for event in ours if _is_number(event.get("seconds")))
        steps = [event["step"] for event in ours if _is_number(event.get("step"))]
        span = f"{min(steps):,} – {max(steps):,}" if steps else ""
        rows.append([text(kind), f"{count:,}", _duration(seconds) if seconds else "", span])
    notable = [event for event in events if event["event"] not in ROUTINE]
    lines = []
    for event in notable[-MAX_EVENTS:]:
        told = {key: value for key, value in event.items() if key not in ("time", "event", "step", "seconds")}
        facts = ", ".join(f"{key} {value}" for key, value in told.items() if value is not None)
        step = f"{event['step']:,}" if _is_number(event.get("step")) else ""
        seconds = _duration(event["seconds"]) if _is_number(event.get("seconds")) else ""
        lines.append([_moment(event["time"]), text(str(event["event"])), step, seconds, text(facts[:MAX_TEXT])])
    earlier = len(notable) - len(lines)
    return (
        f"<h2>Events</h2>{page.table(['event', 'times', 'time in all', 'steps'], rows)}"
        f"<details{' open' if len(lines) <= 30 else ''}><summary>What is not routine"
        f"{f' ({earlier:,} earlier ones are left out)' if earlier else ''}</summary>"
        f"{page.table(['time (UTC)', 'event', 'step', 'took', ''], lines)}</details>"
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _shown(value: float | None) -> str:
    return "–" if value is None else number(value)


def _moment(seconds: float) -> str:
    try:
        return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S")
    except (ValueError, OverflowError, OSError):
        return "?"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    for limit, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * limit:
            return f"{seconds / limit:.1f} {unit}"
    return f"{seconds:.3g} s"
