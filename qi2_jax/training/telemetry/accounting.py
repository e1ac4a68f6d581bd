"""Where a run's time goes: shares of an interval, the log of what happened, goodput, rates and memory.

Goodput is the time of steps that were kept over the wall time since the run's first start, as in ml-goodput-measurement
(AI-Hypercomputer). Everything else lowers it: compilation, restores, saves that block, waiting for data, validation,
time between processes, and steps that were done again after a kill.
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

from qi2_jax.runtime import json_lines
from qi2_jax.training.telemetry import metrics

CATEGORIES = ("data", "save", "evaluate", "sample", "compile")
REST = "steps"  # what no category claims
LOOK_AGAIN = 5e-4  # seconds, at least
# Beginnings of the metrics that depend on the machine: all others are the same when a run is repeated or resumed.
MEASURED = ("time/", "memory/", "goodput", "mfu", "images_per_second", "tokens_per_second", "model_tflops_per_second")

EVENTS = "events.jsonl"
START, RESTORE, COMPILE, SAVE, COMMIT = "start", "restore", "compile", "save", "commit"
DAMAGED, SKIPPED, EVALUATE, SAMPLE = "damaged_checkpoint", "skipped", "evaluate", "sample"
SIGTERM, END, ERROR = "sigterm", "end", "error"
KINDS = (START, RESTORE, COMPILE, SAVE, COMMIT, DAMAGED, SKIPPED, EVALUATE, SAMPLE, SIGTERM, END, ERROR)


class Stopwatch:
    """Where the time between two logged steps goes: every moment belongs to the innermost category being measured."""

    def __init__(self) -> None:
        self._current, self._since = REST, time.monotonic()
        self._spent = dict.fromkeys((*CATEGORIES, REST), 0.0)

    @contextlib.contextmanager
    def measure(self, name: str, since: Callable[[], float] = lambda: -math.inf) -> Iterator[None]:
        """Adds the time of a block to a category; blocks may lie in each other.

        Args:
          since: asked at the end of a block without others in it: what lies before this moment of `time.monotonic`
            stays with the category around the block.
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
        """`time/seconds` since the last lap and the share of it for every category; the shares add up to 1.

        `time/data` near 1 is starvation.
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
    """Since when the devices have nothing left to do, watched during a block.

    Nobody tells when a result becomes ready. A thread looks again and again, each time after a hundredth of the time
    for which it has looked: it is late by no more than that, and leaves the host alone.

    Args:
      result: of the last computation that was dispatched; None: there was none.

    Attributes:
      since: `time.monotonic` of that moment; -inf: before the block, inf: not yet.
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
            if self._ended.wait(max(LOOK_AGAIN, 0.01 * (time.monotonic() - begun))):
                return
        self.since = time.monotonic()


class Events:
    """Appends what happened to `RUN/events.jsonl`, which all processes of a run's life share; only process 0 writes.

    A line is `{"time": seconds since 1970, "event": one of KINDS, "step": ..., "seconds": its length, ...}`.
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
            # The line of a killed process may lack its end: it is left alone, and read as no line.
            torn = file.tell() > 0 and not _ends_with_newline(self.path)
            file.write(b"\n" * torn + json.dumps({**line, **facts}).encode() + b"\n")

    @contextlib.contextmanager
    def measure(self, event: str, step: int | None = None, **facts: Any) -> Iterator[None]:
        """Writes a line with the length of a block, if it ends without an error."""
        begun = time.monotonic()
        yield
        self.write(event, step, time.monotonic() - begun, **facts)


def _ends_with_newline(path: pathlib.Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, 2)
        return file.read(1) == b"\n"


def read_events(path: pathlib.Path) -> list[dict[str, Any]]:
    """Lines of an events file in order, without what killed processes left unfinished; none if there is no file."""
    if not path.exists():
        return []
    return [
        value for value in json_lines.read(path) if isinstance(value.get("time"), (int, float)) and "event" in value
    ]


def has_ended(directory: pathlib.Path, step: int) -> bool:
    """Whether a run came to its end at a step, and nothing was begun there after that."""
    last = [(event["event"], event.get("step")) for event in read_events(directory / EVENTS)][-1:]
    return last == [(END, step)]


def kept_seconds(lines: Iterable[Mapping[str, float]]) -> float:
    """Seconds of steps in metrics lines: `time/seconds` x `time/steps`.

    A resumed run drops the lines that it writes again, so that what was done twice counts once.
    """
    return sum(
        line["time/seconds"] * line[f"time/{REST}"] for line in lines if {"time/seconds", f"time/{REST}"} <= line.keys()
    )


def wall_seconds(events: Iterable[Mapping[str, Any]], until: float) -> float | None:
    """Seconds from a run's first start to `until`, without those between an end and the next start.

    A run that has ended is not waited for; one that was killed or preempted is. None before the first start.
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
    """Share of a run's wall time that went into steps which were kept, between 0 and 1.

    Args:
      events: of `read_events`.
      lines: of `metrics.lines`.
      until: the moment, in seconds since 1970, at which it is stated; None: now.

    Returns:
      kept_seconds / wall_seconds; None before the first start.
    """
    wall = wall_seconds(events, time.time() if until is None else until)
    return None if wall is None else kept_seconds(lines) / max(wall, 1e-9)


class Goodput:
    """The running `goodput` of a run; made after this process's start is in the events and old lines are dropped."""

    def __init__(self, directory: pathlib.Path):
        self._events = read_events(directory / EVENTS)
        path = directory / metrics.FILE
        self._kept = kept_seconds(metrics.lines(path)) if path.exists() else 0.0

    def add(self, lap: Mapping[str, float]) -> dict[str, float]:
        """Counts an interval of `Stopwatch.lap` and states `goodput`; empty where there are no events of a start."""
        self._kept += kept_seconds([lap])
        wall = wall_seconds(self._events, time.time())
        return {} if wall is None else {"goodput": self._kept / max(wall, 1e-9)}


def program() -> dict[str, Any]:
    """What runs, for the event of a start: the source's commit, versions, devices, processes."""
    return {
        "commit": _commit(),
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
    }


def _commit() -> str | None:
    """The source's commit; None for an installed package, also where its environment lies in somebody's repository."""
    root = pathlib.Path(__file__).resolve().parents[3]

    def git(*asked: str) -> str:
        command = ["git", "-C", str(root), *asked]
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()

    try:
        if pathlib.Path(git("rev-parse", "--show-toplevel")).resolve() != root:
            return None
        return git("describe", "--always", "--dirty", "--abbrev=12")
    except (OSError, subprocess.SubprocessError):
        return None


def throughput(
    images: float, tokens: float, flops: float | None, seconds: float, chips: int, peak: float | None = None
) -> dict[str, float]:
    """Rates over an interval.

    Args:
      images, tokens: of all steps and processes in the interval; 0 tokens: there are none to count.
      flops: model operations in the interval (3 x the forward pass, without what is computed again); None: unknown.
      seconds: length of the interval.
      chips: devices of all processes.
      peak: bf16 operations per second of one chip; None: unknown, and then no utilisation is stated.
    """
    rates = {"images_per_second": images / seconds}
    if tokens:
        rates["tokens_per_second"] = tokens / seconds
    if flops is not None:
        achieved = flops / seconds / chips
        rates["model_tflops_per_second_per_chip"] = achieved / 1e12
        if peak is not None:
            rates["mfu"] = achieved / peak
    return rates


def device_memory() -> dict[str, float]:
    """Memory in use and its peak in GiB, of the fullest device of this process; empty where devices do not tell."""
    found = {}
    for name, key in (("memory/gib_in_use", "bytes_in_use"), ("memory/gib_peak", "peak_bytes_in_use")):
        values = []
        for device in jax.local_devices():
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # some backends raise instead of saying None
                values.append((device.memory_stats() or {}).get(key))
        known = [value for value in values if value is not None]
        if known:
            found[name] = max(known) / 2**30
    return found
