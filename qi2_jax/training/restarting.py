"""Refuses to begin a run at step 0 if the checkpoints of an earlier run are gone."""

import json
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax

from qi2_jax.runtime import processes
from qi2_jax.training.checkpoints import files
from qi2_jax.training.telemetry import accounting, metrics

SET_ASIDE = ".before-restart"  # suffix of the records of a run that was started over


def check(directory: pathlib.Path, *, restart: bool = False) -> None:
    """Checks that a run is new or has a checkpoint to resume from. Every process must call it.

    A run that was killed before its first checkpoint was complete simply begins at step 0 again.

    Args:
      directory: folder of the run.
      restart: whether to start over from step 0 if all checkpoints are gone. The metrics and events of the old run get
        the suffix `SET_ASIDE`. A run that has checkpoints is not touched.

    Raises:
      ValueError: if an earlier run saved checkpoints here, none is left, and `restart` is False.
    """
    with processes.raise_together(interruptible=False):
        if jax.process_index() != 0 or files.steps(directory / "checkpoints"):
            return
        saved = last_saved(directory)
        if saved is None:
            return
        if not restart:
            raise ValueError(
                f"{directory} contains a run that saved step {saved:,}, but {directory / 'checkpoints'} has none. "
                "Check whether a disk is not mounted or the checkpoints were deleted. Restore them, choose another "
                "folder, or start over from step 0 with --restart"
            )
        for name in (accounting.EVENTS, metrics.FILE):
            if (directory / name).exists():
                os.replace(directory / name, directory / (name + SET_ASIDE))


def last_saved(directory: pathlib.Path) -> int | None:
    """The last step that the records of a run prove to have been saved completely; None if they prove none."""
    saved = _last_committed(accounting.read_events(directory / accounting.EVENTS))
    return saved if saved is not None else _saved_by_metrics(directory)


def _last_committed(events: Iterable[Mapping[str, Any]]) -> int | None:
    """The last saved step in the events of a run.

    Versions before the event `COMMIT` wrote only that a save began. Such a save was complete when the same process
    began another one, stopped or ended.
    """
    committed, began = None, None
    for event in events:
        kind, step = event["event"], event.get("step")
        if kind == accounting.START:
            began = None
        if not isinstance(step, int) or step < 1:
            continue
        if kind in (accounting.COMMIT, accounting.RESTORE, accounting.SIGTERM, accounting.END):
            committed = step
        elif kind == accounting.SAVE and not event.get("local"):
            committed = committed if began in (None, step) else began
            began = step
    return committed


def _saved_by_metrics(directory: pathlib.Path) -> int | None:
    """A saved step of a run without such events: the last step of a run that ended, or else the first saved step.

    Saves are sequential: metrics past step 2 * `every` prove that checkpoint `every` was complete. A run that has no
    events at all is from an earlier version or has lost them; with metrics of its last step it counts as ended.
    """
    try:
        config = json.loads((directory / "config.json").read_bytes())
        every, steps = config["checkpoint"]["every"], config.get("train", {}).get("steps")
        last = max((line["step"] for line in metrics.lines(directory / metrics.FILE)), default=0)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
    if last and last == steps and not (directory / accounting.EVENTS).exists():
        return steps
    return every if isinstance(every, int) and 0 < 2 * every < last else None
