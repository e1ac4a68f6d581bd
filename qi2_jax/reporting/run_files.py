"""A run as its files describe it: metrics, events and config."""

import json
import os
import pathlib
from collections import Counter
from typing import Any

from qi2_jax.reporting import curves
from qi2_jax.runs import paths
from qi2_jax.training.telemetry import accounting, metrics, sinks

NOT_RUNS = {"checkpoints", "model", sinks.SAMPLES, sinks.TENSORBOARD, "wandb", "profile", "records"}
# Events that are shown as counts.
ROUTINE = {accounting.SAVE, accounting.COMMIT, accounting.EVALUATE, accounting.SAMPLE, accounting.COMPILE}
MAX_JSON_BYTES = 1 << 20  # limit for a config or another JSON file
MAX_TEXT = 300  # characters of a message or a fact


def find_runs(folder: pathlib.Path) -> list[pathlib.Path]:
    """Folders with metrics: `folder` itself and folders below it. Links to folders are not followed."""
    found = []
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if name not in NOT_RUNS and not name.startswith("."))
        if metrics.FILE in files:
            found.append(pathlib.Path(place))
    return found


def read_json(path: pathlib.Path, max_bytes: int) -> dict[str, Any]:
    """The object in a JSON file; empty if there is none, or if the file is larger than `max_bytes`."""
    try:
        value = json.loads(path.read_text(encoding="utf-8")) if path.stat().st_size <= max_bytes else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


class Run:
    """A run, read from its files.

    Attributes:
      folder, name: folder, and its name on the page.
      scan: curves of its metrics.
      events: lines of its journal of events.
      config: config; empty if there is none.
      begun, last_seen: times of its first event and of its last sign of life, in seconds since 1970.
      starts: events of type `start`, one for each process.
      figures: figures of the page, for JSON; None if the files do not contain them.
    """

    def __init__(self, folder: pathlib.Path, name: str):
        self.folder, self.name = folder, name
        self.scan = curves.scan(folder / metrics.FILE)
        self.events = accounting.read_events(folder / accounting.EVENTS)
        self.config = read_json(folder / paths.CONFIG, MAX_JSON_BYTES)
        # Without an end in the events, the last sign of life is the last line of metrics.
        self.last_seen = max([(folder / metrics.FILE).stat().st_mtime, *(event["time"] for event in self.events)])
        self.begun = min([event["time"] for event in self.events], default=self.last_seen)
        self.starts = [event for event in self.events if event["event"] == accounting.START]
        self.figures = self._figures()

    @property
    def last_start(self) -> dict[str, Any]:
        return self.starts[-1] if self.starts else {}

    def _figures(self) -> dict[str, Any]:
        wall = accounting.wall_seconds(self.events, self.last_seen)
        train, found = self.config.get("train"), self.scan.curves
        return {
            "run": self.name,
            "name": self.last_start.get("name"),
            "commit": self.last_start.get("commit"),
            "state": _state(self.events),
            "step": self.scan.step,
            "steps": train.get("steps") if isinstance(train, dict) else None,
            "wall_seconds": wall,
            "goodput": None if wall is None else self.scan.kept_seconds / max(wall, 1e-9),
            "restarts": max(0, len(self.starts) - 1),
            "skipped_steps": found["skipped_total"].last if "skipped_total" in found else None,
            "events": dict(Counter(str(event["event"]) for event in self.events)),
            "lowest_validation_loss": found["validation_loss"].low if "validation_loss" in found else None,
            "last": {name: curve.last for name, curve in found.items()},
        }


def _state(events: list[dict[str, Any]]) -> str:
    """The state of a run, from the last event that is not routine."""
    last = next((event for event in reversed(events) if event["event"] not in ROUTINE), None)
    if last is None:
        return "unknown"
    if last["event"] == accounting.END:
        return "finished"
    if last["event"] == accounting.SIGTERM:
        return "stopped by SIGTERM, can be resumed"
    if last["event"] == accounting.ERROR:
        return f"failed: {str(last.get('message', 'no message'))[:MAX_TEXT]}"
    return "running, or killed"
