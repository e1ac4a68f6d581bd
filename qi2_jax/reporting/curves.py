"""Curves of a metrics file. It is read once, and memory does not grow with the number of its lines."""

import dataclasses
import pathlib
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.json
from jaxtyping import Float

from qi2_jax.runtime import json_lines

POINTS = 400  # points of a curve; a chart is about that many pixels wide
MAX_CURVES = 500  # this trainer writes fewer metrics
BLOCK = 1 << 25  # bytes read at once


class Curve:
    """One metric over steps, in at most 2 x `POINTS` buckets of consecutive steps. Values that are not finite are gaps.

    Attributes:
      count: number of values.
      first, last, low: first, last and lowest value.
      width: steps per bucket.
      span: first and last step.
    """

    def __init__(self) -> None:
        self.count, self.first, self.last, self.low, self.width = 0, np.nan, np.nan, np.inf, 1
        self.span = np.inf, -np.inf
        self._rows = np.empty((6, 0))  # lowest step, sum of steps, sum, lowest, highest, count

    def add(self, steps: Float[np.ndarray, " N"], values: Float[np.ndarray, " N"]) -> None:
        """Appends values; steps must not decrease."""
        good = np.isfinite(values) & np.isfinite(steps)
        steps, values = steps[good], values[good]
        if not values.size:
            return
        self.first = self.first if self.count else float(values[0])
        self.last, self.low = float(values[-1]), min(self.low, float(values.min()))
        self.span = min(self.span[0], float(steps.min())), max(self.span[1], float(steps.max()))
        self.count += values.size
        rows = np.concatenate([self._rows, [steps, steps, values, values, values, np.ones_like(steps)]], axis=1)
        if rows.shape[1] > 2 * POINTS:
            span = rows[0].max() - rows[0].min() + 1
            while span / self.width > POINTS:
                self.width *= 2
            rows = rows[:, np.argsort(rows[0], kind="stable")]
            starts = np.flatnonzero(np.diff(rows[0] // self.width, prepend=-np.inf))
            how = (np.minimum, np.add, np.add, np.minimum, np.maximum, np.add)
            rows = np.stack([one.reduceat(row, starts) for one, row in zip(how, rows, strict=True)])
        self._rows = rows

    @property
    def points(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Mean step, mean value, lowest and highest value of each bucket."""
        _, steps, sums, low, high, counts = self._rows
        return steps / counts, sums / counts, low, high


@dataclasses.dataclass
class Scan:
    """The content of a metrics file.

    Attributes:
      curves: curve of each metric.
      step: highest step; None if the file has no lines.
      kept_seconds: see `qi2_jax.training.telemetry.accounting`.
    """

    curves: dict[str, Curve] = dataclasses.field(default_factory=dict)
    step: int | None = None
    kept_seconds: float = 0.0


def scan(path: pathlib.Path) -> Scan:
    """Reads a metrics file, without values that are not numbers and lines that a killed process left unfinished."""
    found = Scan()
    for block in _blocks(path):
        columns = _columns(block)
        steps = columns.pop("step", np.empty(0))
        if np.isfinite(steps).any():
            found.step = max(found.step or 0, int(np.nanmax(steps)))
        for name, values in columns.items():
            if name in found.curves or len(found.curves) < MAX_CURVES:
                found.curves.setdefault(name, Curve()).add(steps, values)
        if {"time/seconds", "time/steps"} <= columns.keys():
            found.kept_seconds += float(np.nansum(columns["time/seconds"] * columns["time/steps"]))
    found.curves = {name: curve for name, curve in found.curves.items() if curve.count}
    return found


def _blocks(path: pathlib.Path) -> Iterator[bytes]:
    """Blocks of whole lines of a file; the last line may be unfinished."""
    with path.open("rb") as file:
        rest = b""
        while data := file.read(BLOCK):
            lines, newline, data = (rest + data).rpartition(b"\n")
            if newline:
                yield lines + newline
            rest = data
        if rest:
            yield rest


def _columns(block: bytes) -> dict[str, np.ndarray]:
    """The numbers of a block of lines by metric, NaN where a line has no value. Empty if there are no steps."""
    try:
        table = pyarrow.json.read_json(pa.BufferReader(block))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):  # an unfinished line, or a value of another type
        return _columns_by_line(block)
    numbers = [name for name in table.column_names if _is_number(table.schema.field(name).type)]
    columns = {name: table.column(name).to_numpy().astype(np.float64) for name in numbers}
    return columns if "step" in columns else {}


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind)


def _columns_by_line(block: bytes) -> dict[str, np.ndarray]:
    lines = []
    for text in block.splitlines():
        if (line := json_lines.parse(text)) is not None:
            numbers = {name: float(value) for name, value in line.items() if type(value) in (int, float)}
            if "step" in numbers:
                lines.append(numbers)
    names = dict.fromkeys(name for line in lines for name in line)
    return {name: np.array([line.get(name, np.nan) for line in lines]) for name in [*names][: MAX_CURVES + 1]}
