"""Line charts, which `qi2_jax/pages/templates/chart.html` draws as SVG with a legend."""

import dataclasses
import math
from collections.abc import Sequence
from typing import overload

import numpy as np

from qi2_jax.reporting.curves import Curve
from qi2_jax.reporting.formats import number

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 560, 240, 58, 14, 10, 24  # pixels; the last four are margins
COLORS = ("#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed", "#0891b2", "#be185d", "#65a30d", "#78716c", "#1e293b")
RAMP = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (222, 190, 20))  # viridis, its end darkened
LOG_FROM = 5  # ratio of highest to lowest value from which an axis is logarithmic
MAX_SHADED = 3  # lines of a chart up to which the range of each is shaded
MAX_DOTTED = 40  # points of a line up to which each is marked by a dot


@dataclasses.dataclass(frozen=True)
class Line:
    """A curve of a chart. Lines with the same `color`, which is a key, share a color and differ by their dashes."""

    label: str
    curve: Curve
    color: str
    dashed: bool = False


@dataclasses.dataclass(frozen=True)
class Trace:
    """A line as it is drawn.

    Attributes:
      label, last: name and last value, for the legend.
      color: CSS color.
      dashed: whether the line is dashed.
      path: SVG path of the means.
      range: SVG path around the lowest and highest values; empty if they are not shaded.
      points: places of the dots.
    """

    label: str
    last: str
    color: str
    dashed: bool
    path: str
    range: str
    points: list[tuple[str, str]]


@dataclasses.dataclass(frozen=True)
class Chart:
    """The input of the template: `rows` and `columns` are the places and labels of the ticks on both axes."""

    rows: list[tuple[float, str]]
    columns: list[tuple[float, str]]
    logarithmic: bool
    restarts: list[tuple[float, str]]
    traces: list[Trace]
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = RIGHT
    top: int = TOP
    bottom: int = BOTTOM


def chart(lines: Sequence[Line], span: tuple[float, float], restarts: Sequence[float] = ()) -> Chart:
    """A chart of curves over steps.

    A curve of many steps is drawn as the mean of each bucket. The range from the lowest to the highest value is shaded
    if the chart has few curves. The axis is logarithmic if all values are positive and spread widely.

    Args:
      lines: curves, at least one.
      span: first and last step of the axis.
      restarts: steps at which to draw a mark.
    """
    colors = _colors(lines)
    shaded = len(lines) <= MAX_SHADED
    points = [line.curve.points for line in lines]
    low = min(float((lows if shaded else means).min()) for _, means, lows, _ in points)
    high = max(float((highs if shaded else means).max()) for _, means, _, highs in points)
    y = Axis(low, high, HEIGHT - BOTTOM, TOP, low > 0 and high / low >= LOG_FROM)
    x = Axis(*span, LEFT, WIDTH - RIGHT, False, tight=True)
    marks = [(_place(x, step), f"{step:.0f}") for step in restarts if span[0] < step < span[1]]
    columns = [(_place(x, tick), number(tick)) for tick in x.ticks() if tick == round(tick)]
    rows = [(_place(y, tick), number(tick)) for tick in y.ticks()]
    return Chart(rows, columns, y.logarithmic, marks, [_trace(line, colors, x, y, shaded) for line in lines])


class Axis:
    """Maps values to pixels, and chooses round values for ticks."""

    def __init__(self, low: float, high: float, begin: float, end: float, logarithmic: bool, tight: bool = False):
        if not logarithmic and not tight and 0 <= low < 0.4 * high:
            low = 0.0
        if low == high:
            room = abs(low) * 0.05 or 0.5
            low, high, logarithmic = low - room if low else 0.0, high + room, False
        elif not tight:
            room = (high / low) ** 0.04 if logarithmic else (high - low) * 0.05
            high = high * room if logarithmic else high + room
            low = low / room if logarithmic else low - (room if low else 0.0)
        self.low, self.high, self.begin, self.end, self.logarithmic = low, high, begin, end, logarithmic

    @overload
    def __call__(self, values: float) -> float: ...

    @overload
    def __call__(self, values: np.ndarray) -> np.ndarray: ...

    def __call__(self, values: np.ndarray | float) -> np.ndarray | float:
        low, high = self.low, self.high
        if self.logarithmic:
            values, low, high = np.log(values), math.log(low), math.log(high)
        return self.begin + (np.asarray(values) - low) / (high - low) * (self.end - self.begin)

    def ticks(self) -> list[float]:
        """Some round values within the axis."""
        if not self.logarithmic:
            step = _round_up((self.high - self.low) / 5)
            return [step * n for n in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        factors = (1, 2, 5) if len(decades) <= 4 else (1,)
        ticks = [factor * 10.0**decade for decade in decades for factor in factors]
        ticks = [tick for tick in ticks if self.low <= tick <= self.high]
        return ticks[:: -(-len(ticks) // 9)] if ticks else []


def _round_up(step: float) -> float:
    decade = 10.0 ** math.floor(math.log10(step))
    return next(factor * decade for factor in (1, 2, 5, 10) if factor * decade >= step * 0.999)


def _trace(line: Line, colors: dict[str, str], x: Axis, y: Axis, shaded: bool) -> Trace:
    steps, means, lows, highs = line.curve.points
    across, down, outline = x(steps), y(means), ""
    if shaded and line.curve.width > 1:
        outline = _path(np.concatenate([across, across[::-1]]), np.concatenate([y(lows), y(highs)[::-1]]))
    dotted = len(steps) <= MAX_DOTTED
    dots = [(f"{a:.1f}", f"{d:.1f}") for a, d in zip(across, down, strict=True)] if dotted else []
    last, path = number(line.curve.last), _path(across, down)
    return Trace(line.label, last, colors[line.color], line.dashed, path, outline, dots)


def _place(axis: Axis, value: float) -> float:
    return round(float(axis(value)), 1)


def _path(across: np.ndarray, down: np.ndarray) -> str:
    return "M" + "L".join(f"{a:.1f},{d:.1f}" for a, d in zip(across, down, strict=True))


def _colors(lines: Sequence[Line]) -> dict[str, str]:
    """A color for each key. Keys that are numbers, as bins of t are, get the colors of a ramp."""
    keys = list(dict.fromkeys(line.color for line in lines))
    if (len(keys) > 2 and all(key.isdecimal() for key in keys)) or len(keys) > len(COLORS):
        places = np.linspace(0, len(RAMP) - 1, len(keys))
        channels = [np.interp(places, range(len(RAMP)), channel) for channel in zip(*RAMP, strict=True)]
        return {key: "#" + "".join(f"{int(c[i]):02x}" for c in channels) for i, key in enumerate(keys)}
    return dict(zip(keys, COLORS, strict=False))
