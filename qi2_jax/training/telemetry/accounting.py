"""Where the time of a run goes: shares of an interval, the log of events, goodput, throughput and memory.

Goodput is the time of all steps that were kept, divided by the wall time since the run's first start, as in
ml-goodput-measurement (AI-Hypercomputer). Everything else lowers it: compilation, restores, saves that block, waiting
for data, validation, time between processes, and steps that were repeated after a kill.
"""

import contextlib
import json
import math
import pathlib
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax

from qi2_jax.runtime import compiler, json_lines
from qi2_jax.training.telemetry import metrics

CATEGORIES = ("data", "save", "evaluate", "sample", "compile")
REST = "steps"  # the time outside all categories
MIN_POLL = 5e-4  # seconds

EVENTS = "events.jsonl"
START, RESTORE, COMPILE, SAVE, COMMIT = "start", "restore", "compile", "save", "commit"
DAMAGED, SKIPPED, EVALUATE, SAMPLE = "damaged_checkpoint", "skipped", "evaluate", "sample"
SIGTERM, END, ERROR = "sigterm", "end", "error"
KINDS = (START, RESTORE, COMPILE, SAVE, COMMIT, DAMAGED, SKIPPED, EVALUATE, SAMPLE, SIGTERM, END, ERROR)


class Stopwatch:
    """Divides the time between two logged steps: every moment belongs to the innermost category being measured."""

    def __init__(self) -> None:
        self._current, self._since = REST, time.monotonic()
        self._spent = dict.fromkeys((*CATEGORIES, REST), 0.0)

    @contextlib.contextmanager
    def measure(self, name: str, since: Callable[[], float] = lambda: -math.inf) -> Iterator[None]:
        """Adds the time of a block to a category. Blocks may be nested.

        Args:
          name: time category.
          since: callback at the end of a block without nested blocks. It returns a moment of `time.monotonic`; time
            before that moment stays with the surrounding category.
        """
        if name not in self._spent:
            raise ValueError(f"time category {name!r} is unknown; choose one of {sorted(self._spent)}")
        outer = self._switch(name)
        begun = self._since
        try:
            yield
        finally:
            moment = since()
            self._switch(outer)
            before = min(max(moment, begun), self._since) - begun
            self._spent[name] -= before
            self._spent[outer] += before

    def lap(self) -> dict[str, float]:
        """`time/seconds` since the last lap, and the share of every category; the shares add up to 1.

        A `time/data` near 1 means that the devices starve.
        """
        self._switch(self._current)
        total = max(sum(self._spent.values()), 1e-9)
        shares = {f"time/{name}": seconds / total for name, seconds in self._spent.items()}
        self._spent = dict.fromkeys(self._spent, 0.0)
        return {"time/seconds": total, **shares}

    def _switch(self, name: str) -> str:
        now, outer = time.monotonic(), self._current
        self._spent[outer] += now - self._since
        self._current, self._since = name, now
        return outer


class Idle:
    """Finds the moment in a block at which the devices run out of work.

    JAX has no callback for a result that becomes ready, so a thread polls. Its interval is 1/100 of the time it has
    waited so far: the answer is late by no more than that, and the host stays free.

    Args:
      result: output of the last computation that was dispatched; None if there was none.

    Attributes:
      since: `time.monotonic` of that moment; -inf if it was before the block, inf if it has not come yet.
    """

    def __init__(self, result: Any):
        self._result = result
        self.since = -math.inf if result is None or result.is_ready() else math.inf
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="idle", daemon=True)

    def __enter__(self) -> "Idle":
        if self.since == math.inf:
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _watch(self) -> None:
        begun = time.monotonic()
        while not self._result.is_ready():
            if self._ended.wait(max(MIN_POLL, 0.01 * (time.monotonic() - begun))):
                return
        self.since = time.monotonic()


class Events:
    """Appends events to `RUN/events.jsonl`, which all starts of a run share. Only process 0 writes.

    A line is `{"time": seconds since 1970, "event": one of KINDS, "step": ..., "seconds": duration, ...}`.
    """

    def __init__(self, directory: pathlib.Path):
        self.path = directory / EVENTS
        self._writes = jax.process_index() == 0

    def write(self, event: str, step: int | None = None, seconds: float | None = None, **facts: Any) -> None:
        """Appends a line; `facts` are plain JSON values."""
        assert event in KINDS, event
        if not self._writes:
            return
        line: dict[str, Any] = {"time": time.time(), "event": event}
        line |= {name: value for name, value in (("step", step), ("seconds", seconds)) if value is not None}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            # A killed process may have left a line without its end, which readers skip.
            torn = file.tell() > 0 and not _ends_with_newline(self.path)
            file.write(b"\n" * torn + json.dumps({**line, **facts}).encode() + b"\n")

    @contextlib.contextmanager
    def measure(self, event: str, step: int | None = None, **facts: Any) -> Iterator[None]:
        """Writes a line with the duration of a block, if it ends without an error."""
        begun = time.monotonic()
        yield
        self.write(event, step, time.monotonic() - begun, **facts)


def _ends_with_newline(path: pathlib.Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, 2)
        return file.read(1) == b"\n"


def read_events(path: pathlib.Path) -> list[dict[str, Any]]:
    """Lines of an events file in order, without unfinished lines of killed processes; empty if there is no file."""
    if not path.exists():
        return []
    return [
        value for value in json_lines.read(path) if isinstance(value.get("time"), (int, float)) and "event" in value
    ]


def has_ended(directory: pathlib.Path, step: int) -> bool:
    """Whether a run ended at a step and was not started again after that."""
    last = [(event["event"], event.get("step")) for event in read_events(directory / EVENTS)][-1:]
    return last == [(END, step)]


def kept_seconds(lines: Iterable[Mapping[str, float]]) -> float:
    """Total time of the steps in metrics lines: `time/seconds` x `time/steps`.

    A resumed run removes the lines that it writes again, so repeated steps count once.
    """
    return sum(
        line["time/seconds"] * line[f"time/{REST}"] for line in lines if {"time/seconds", f"time/{REST}"} <= line.keys()
    )


def wall_seconds(events: Iterable[Mapping[str, Any]], until: float) -> float | None:
    """Seconds from a run's first start to `until`, without the time between an end and the next start.

    The time between a kill or a preemption and the next start counts. None before the first start.
    """
    begun, ended, idle = None, None, 0.0
    for event in events:
        if event["event"] == START:
            begun = event["time"] if begun is None else begun
            idle += 0.0 if ended is None else event["time"] - ended
        ended = event["time"] if event["event"] == END else None
    if begun is None:
        return None
    return (until if ended is None else ended) - begun - idle


def goodput(
    events: Iterable[Mapping[str, Any]], lines: Iterable[Mapping[str, float]], until: float | None = None
) -> float | None:
    """Share of a run's wall time that was spent on steps that were kept, between 0 and 1.

    Args:
      events: events from `read_events`.
      lines: lines from `metrics.lines`.
      until: end of the wall time, in seconds since 1970; None: now.

    Returns:
      kept_seconds / wall_seconds; None before the first start.
    """
    wall = wall_seconds(events, time.time() if until is None else until)
    return None if wall is None else kept_seconds(lines) / max(wall, 1e-9)


class Goodput:
    """The running `goodput` of a run. Create it after the start is in the events and old metrics are removed."""

    def __init__(self, directory: pathlib.Path):
        self._events = read_events(directory / EVENTS)
        path = directory / metrics.FILE
        self._kept = kept_seconds(metrics.lines(path)) if path.exists() else 0.0

    def add(self, lap: Mapping[str, float]) -> dict[str, float]:
        """Adds an interval of `Stopwatch.lap` and returns `goodput`; empty if the events have no start."""
        self._kept += kept_seconds([lap])
        wall = wall_seconds(self._events, time.time())
        return {} if wall is None else {"goodput": self._kept / max(wall, 1e-9)}


def program() -> dict[str, Any]:
    """Describes the program for the event of a start: commit, versions, devices, processes, options of the compiler."""
    return {
        "commit": _commit(),
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "compiler": compiler.options_for(jax.devices()),
    }


def _commit() -> str | None:
    """The commit of the source; None for an installed package, even if its environment is inside a repository."""
    root = pathlib.Path(__file__).resolve().parents[3]

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()

    try:
        if pathlib.Path(git("rev-parse", "--show-toplevel")).resolve() != root:
            return None
        return git("describe", "--always", "--dirty", "--abbrev=12")
    except (OSError, subprocess.SubprocessError):
        return None


def throughput(
    images: float,
    slots: float,
    flops: float | None,
    seconds: float,
    chips: int,
    peak: float | None = None,
    *,
    padding: float = 0.0,
    useful: float = 1.0,
) -> dict[str, float]:
    """Rates over an interval. Those of slots count padding, and all others leave it out.

    Args:
      images: number of images in the interval, of all steps and processes.
      slots: number of slots of their joint sequences, padding included; 0 if images have none.
      flops: model FLOPs of all slots in the interval (3 x the forward pass, without recomputation); None if unknown.
      seconds: length of the interval.
      chips: number of devices of all processes.
      peak: bf16 FLOP/s of one chip; None if unknown, which leaves out the utilisation.
      padding: share of the slots that are padding.
      useful: share of the FLOPs that the tokens would take without padding.
    """
    rates = {"images_per_second": images / seconds}
    if slots:
        rates |= {"tokens_per_second": slots * (1 - padding) / seconds, "slots_per_second": slots / seconds}
    if flops is not None:
        achieved = flops / seconds / chips
        rates["model_tflops_per_second_per_chip"] = useful * achieved / 1e12
        if peak is not None:
            rates |= {"mfu": useful * achieved / peak, "mfu_slots": achieved / peak}
    return rates


def device_memory() -> dict[str, float]:
    """Memory in use and its peak in GiB, on this process's fullest device; empty if the devices do not report it."""
    found = {}
    for name, key in (("memory/gib_in_use", "bytes_in_use"), ("memory/gib_peak", "peak_bytes_in_use")):
        values = []
        for device in jax.local_devices():
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # some backends raise instead of returning None
                values.append((device.memory_stats() or {}).get(key))
        known = [value for value in values if value is not None]
        if known:
            found[name] = max(known) / 2**30
    return found
