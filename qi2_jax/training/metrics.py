"""What a run reports: one JSON line per logged step, and a progress bar with time left."""

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from tqdm import tqdm


class Metrics:
    """Appends `{"step": ..., "name": value, ...}` lines to a file; only process 0 writes.

    Args:
      path: the file; lines that this run will write again are dropped: those after `start`, or all from step 0.
      start: the step from which the run continues.
    """

    def __init__(self, path: pathlib.Path, start: int):
        self.path = path
        if jax.process_index() == 0 and path.exists():
            kept = [line for line in read(path) if start > 0 and line["step"] <= start]
            temporary = path.with_suffix(".tmp")
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
            os.replace(temporary, path)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        if jax.process_index() == 0:
            plain = {name: float(np.asarray(value)) for name, value in values.items()}
            with self.path.open("a") as file:
                file.write(json.dumps({"step": step, **plain}) + "\n")


def read(path: pathlib.Path) -> list[dict[str, float]]:
    """Lines of a metrics file; a last line cut by a killed process is left out."""
    lines = []
    for line in path.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return lines


class Progress:
    """A progress bar over steps with loss, samples per second and time left."""

    def __init__(self, name: str, start: int, total: int, samples_per_step: int):
        self._bar = tqdm(
            total=total, initial=start, desc=name, unit="step", dynamic_ncols=True, disable=jax.process_index() != 0
        )
        self._samples = samples_per_step

    def advance(self, values: Mapping[str, Any] | None) -> None:
        """Counts one step; with its metrics, waits for them and shows them."""
        if values is not None:
            rate = (self._bar.format_dict["rate"] or 0.0) * self._samples
            self._bar.set_postfix_str(f"loss {float(values['loss']):.4f}, {rate:.1f} samples/s", refresh=False)
        self._bar.update()

    def note(self, text: str) -> None:
        self._bar.write(text)

    def close(self) -> None:
        self._bar.close()
