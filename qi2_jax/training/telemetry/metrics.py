"""Metrics and drawings of a run: JSON lines, image files, TensorBoard, Weights & Biases.

docs/monitoring.md documents the names and formulas of all metrics.
"""

import dataclasses
import json
import math
import os
import pathlib
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from qi2_jax.runtime import json_lines
from qi2_jax.training.config import check_sinks
from qi2_jax.training.mean import Mean
from qi2_jax.training.telemetry.sinks import SAMPLES, TENSORBOARD, TensorBoard, WeightsAndBiases

EVALUATION = "validation_loss"  # marks the lines of evaluations
FILE = "metrics.jsonl"
GRID, NOTES, WHOLE = ".png", ".json", ".full"  # suffixes of the files of a drawing, after NAME-STEP
LAST = ("skipped_total",)  # counters: of several steps the last value is logged
MAX = ("skipped",)  # of several steps the highest value is logged

_STEP = re.compile(rb'\{"step": (\d+)[,}]')
_IMAGE_NAME = re.compile(r"[\w.-]+")
_COMPRESSION = 1  # PNG level; steps wait for it, and the default of 6 takes twice the time for files 1/8 smaller


@dataclasses.dataclass(frozen=True)
class Drawing:
    """A grid of images.

    Attributes:
      pixels: RGB or RGBA, 0..255.
      notes: description of the grid, as plain JSON.
      whole: images at full size, by name, that the grid shows reduced.
    """

    pixels: UInt8[np.ndarray, "H W c"]
    notes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    whole: Mapping[str, UInt8[np.ndarray, "_ _ c"]] = dataclasses.field(default_factory=dict)


class Metrics:
    """Writes the metrics and drawings of a run, in process 0 only.

    `RUN/metrics.jsonl` gets a line `{"step": ..., "name": value, ...}` per call, with null for values that are not
    finite. Lines and drawings after `start`, or all of them from step 0, are removed because the run writes them again.
    In TensorBoard these points are voided. Weights & Biases keeps the first value of a step, which a resumed run
    repeats bit for bit.

    Args:
      directory: folder of the run.
      start: step from which the run continues.
      sinks: further destinations, see `SINKS`.
      config: plain JSON values, for sinks that show them.

    Raises:
      ValueError: if a sink is unknown or not installed.
    """

    def __init__(
        self,
        directory: pathlib.Path,
        start: int,
        sinks: Sequence[str] = ("tensorboard",),
        config: Mapping[str, Any] | None = None,
    ):
        check_sinks(sinks)
        self._samples, self.path = directory / SAMPLES, directory / FILE
        self._sinks: list[TensorBoard | WeightsAndBiases] = []
        self._writes = jax.process_index() == 0
        if not self._writes:
            return
        directory.mkdir(parents=True, exist_ok=True)
        _drop_after(self.path, start)
        _drop_drawings(self._samples, start)
        if "tensorboard" in sinks:
            self._sinks.append(TensorBoard(directory / TENSORBOARD, start))
        if "wandb" in sinks:
            self._sinks.append(WeightsAndBiases(directory, start, config))

    def names(self) -> list[str]:
        """Names of all metrics that were written so far; empty in processes that do not write."""
        known = lines(self.path) if self._writes and self.path.exists() else ()
        return sorted({name for line in known for name in line} - {"step"})

    def already_done(self, step: int) -> list[str]:
        """Which of "evaluate" and "sample" the files of the run contain for a step."""
        found = []
        if self.path.exists() and any(line["step"] == step and EVALUATION in line for line in lines(self.path)):
            found.append("evaluate")
        if any(self._samples.glob(f"*-{step}{GRID}")):
            found.append("sample")
        return found

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes metrics of a step, each name at most once per step.

        Raises:
          OSError: if the disk is full, naming the file or folder.
        """
        if not self._writes:
            return
        plain = {name: float(np.asarray(value)) for name, value in values.items()}
        try:
            with self.path.open("a") as file:
                file.write(_line({"step": step, **plain}))
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error
        for sink in self._sinks:
            sink.scalars(step, plain)

    def write_drawings(self, step: int, drawings: Mapping[str, Drawing]) -> None:
        """Writes drawings by name.

        The grid goes to `RUN/samples/NAME-STEP.png` and to the sinks, the notes to `NAME-STEP.json`, and images at full
        size to `NAME-STEP.full/IMAGE_NAME.png`.

        Raises:
          ValueError: if a name is not a valid file name.
        """
        for name in [*drawings, *(image for drawing in drawings.values() for image in drawing.whole)]:
            if not _IMAGE_NAME.fullmatch(name):
                raise ValueError(f"image name {name!r} must consist of letters, digits, '.', '-' and '_'")
        if not self._writes:
            return
        self._samples.mkdir(exist_ok=True)
        grids = {name: self._samples / f"{name}-{step}{GRID}" for name in drawings}
        files = {grids[name].with_suffix(".partial"): drawing.pixels for name, drawing in drawings.items()}
        for name, drawing in drawings.items():
            if drawing.whole:
                grids[name].with_suffix(WHOLE).mkdir(exist_ok=True)
                files |= {
                    grids[name].with_suffix(WHOLE) / f"{image}.png": pixels for image, pixels in drawing.whole.items()
                }
            if drawing.notes:
                text = json.dumps(drawing.notes, ensure_ascii=False, indent=1)
                grids[name].with_suffix(NOTES).write_text(text + "\n", encoding="utf-8")
        for path, pixels in files.items():
            Image.fromarray(pixels).save(path, "PNG", compress_level=_COMPRESSION)
        for path in grids.values():  # last, because a grid proves that its step was drawn completely
            os.replace(path.with_suffix(".partial"), path)
        for sink in self._sinks:
            sink.images(step, grids)

    def close(self) -> None:
        """Waits until the sinks have written everything."""
        for sink in self._sinks:
            sink.close()
        self._sinks = []


def _drop_drawings(folder: pathlib.Path, start: int) -> None:
    """Removes the drawings after step `start`, or all for 0, and those that a killed process left unfinished."""
    found = [
        (path, path.stem.rpartition("-")[2])
        for path in (folder.iterdir() if folder.is_dir() else ())
        if path.suffix in (GRID, NOTES, WHOLE, ".partial")
    ]
    # The grid of a drawing gets its name last, after everything is written.
    unfinished = {step for path, step in found if path.suffix == ".partial" or not path.with_suffix(GRID).exists()}
    for path, step in found:
        if step.isdecimal() and (start == 0 or int(step) > start or step in unfinished):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _line(values: Mapping[str, float]) -> str:
    """A line of the metrics file; null stands for NaN and infinity, which JSON lacks."""
    return json_lines.dump({name: value if math.isfinite(value) else None for name, value in values.items()})


def _drop_after(path: pathlib.Path, start: int) -> None:
    """Cuts the lines after step `start`, or all for 0, and an unfinished line of a killed process at the end."""
    if not path.exists():
        return
    position = end = 0
    with path.open("r+b") as file:
        for line in file if start else ():
            step = _step_of(line)
            if step is not None and step > start:
                break
            position += len(line)
            end = end if step is None else position
        file.truncate(end)


def _step_of(line: bytes) -> int | None:
    """The step of a line, None for an unfinished or foreign line. Lines of this module are not parsed completely."""
    if not line.endswith(b"\n"):
        return None
    found = _STEP.match(line)
    try:
        step = int(found[1]) if found else json.loads(line)["step"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    return step if type(step) is int else None


def lines(path: pathlib.Path) -> Iterator[dict[str, float]]:
    """Lines of a metrics file, with NaN for values that were not finite, and without unfinished or foreign lines."""
    for values in json_lines.read(path):
        if type(values.get("step")) is int:
            numbers = {name: math.nan if value is None else value for name, value in values.items()}
            yield {name: value for name, value in numbers.items() if type(value) in (int, float)}


def read(path: pathlib.Path) -> list[dict[str, float]]:
    """All `lines` of a metrics file."""
    return list(lines(path))


def fetch(steps: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Combines the metrics of one or several steps into one number per name, with one transfer from the devices.

    A `Mean` becomes the sum of totals over the sum of counts, and is left out if nothing was counted. Other values
    are averaged over the steps that have them, except those in `LAST` and `MAX`. Values that are not finite, as of
    skipped steps, count only where there are no others.

    Args:
      steps: values by name: numbers, arrays that are replicated over the devices of all processes, or a `Mean` of them.
    """
    fetched = jax.device_get([dict(step) for step in steps])
    result = {}
    for name in dict.fromkeys(name for step in fetched for name in step):
        values = [step[name] for step in fetched if name in step]
        if isinstance(values[0], Mean):
            if (mean := _combined(values)) is not None:
                result[name] = mean
            continue
        numbers = [float(value) for value in values]
        if name in LAST:
            result[name] = numbers[-1]
        elif name in MAX:
            result[name] = max(numbers)
        else:
            result[name] = float(np.mean([value for value in numbers if math.isfinite(value)] or numbers))
    return result


def _combined(means: Sequence[Mean]) -> float | None:
    """The mean of all; None if nothing was counted."""
    pairs = [(float(mean.total), float(mean.count)) for mean in means]
    finite = [pair for pair in pairs if math.isfinite(pair[0])] or pairs
    count = sum(count for _, count in finite)
    return sum(total for total, _ in finite) / count if count > 0 else None
