"""What a run reports: one JSON line per logged step, and a progress bar with time left."""

import contextlib
import json
import math
import os
import pathlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from tqdm import tqdm


class Metrics:
    """Appends `{"step": ..., "name": value, ...}` lines to a file; only process 0 writes. What is not finite is null.

    Args:
      path: the file; lines that this run will write again are dropped: those after `start`, or all from step 0.
      start: the step from which the run continues.
    """

    def __init__(self, path: pathlib.Path, start: int):
        self.path = path
        if jax.process_index() == 0 and path.exists():
            kept = [line for line in read(path) if start > 0 and line["step"] <= start]
            temporary = path.with_suffix(".tmp")
            temporary.write_text("".join(map(_line, kept)))
            os.replace(temporary, path)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        if jax.process_index() == 0:
            plain = {name: float(np.asarray(value)) for name, value in values.items()}
            with self.path.open("a") as file:
                file.write(_line({"step": step, **plain}))


def _line(values: Mapping[str, float]) -> str:
    """JSON has no NaN and no infinity."""
    return json.dumps({name: value if math.isfinite(value) else None for name, value in values.items()}) + "\n"


def read(path: pathlib.Path) -> list[dict[str, float]]:
    """Lines of a metrics file, values that were not finite as NaN; a last line cut by a killed process is left out."""
    lines = []
    for line in path.read_text().splitlines():
        try:
            values = json.loads(line)
        except json.JSONDecodeError:
            continue
        lines.append({name: math.nan if value is None else value for name, value in values.items()})
    return lines


class Stopwatch:
    """Where the time between two logged steps goes."""

    def __init__(self):
        self._begun, self._spent = time.monotonic(), dict.fromkeys(("data",), 0.0)

    @contextlib.contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Adds the time of a block to `name`."""
        begun = time.monotonic()
        yield
        self._spent[name] += time.monotonic() - begun

    def lap(self) -> dict[str, float]:
        """`time/seconds` since the last lap and the share of it for every name: `time/data` near 1 is starvation."""
        now = time.monotonic()
        total = max(now - self._begun, 1e-9)
        shares = {f"time/{name}": seconds / total for name, seconds in self._spent.items()}
        self._begun, self._spent = now, dict.fromkeys(self._spent, 0.0)
        return {"time/seconds": total, **shares}


class Progress:
    """A progress bar over steps with loss, samples per second and time left."""

    def __init__(self, name: str, start: int, total: int):
        self._bar = tqdm(
            total=total, initial=start, desc=name, unit="step", dynamic_ncols=True, disable=jax.process_index() != 0
        )
        self._samples, self._begun = 0, time.monotonic()

    def advance(self, samples: int, values: Mapping[str, Any] | None) -> None:
        """Counts one step; with its metrics, waits for them and shows them."""
        self._samples += samples
        if values is not None:
            loss, rate = float(values["loss"]), self._samples / (time.monotonic() - self._begun)
            self._bar.set_postfix_str(f"loss {loss:.4f}, {rate:.1f} samples/s", refresh=False)
        self._bar.update()

    def note(self, text: str) -> None:
        self._bar.write(text)

    def close(self) -> None:
        self._bar.close()
