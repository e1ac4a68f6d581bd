"""Line charts as inline SVG, with a legend in HTML."""

import dataclasses
import html
import math
from collections.abc import Sequence

import numpy as np

from qi2_jax.reporting.curves import Curve

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 560, 240, 58, 14, 10, 24
COLORS = ("#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed", "#0891b2", "#be185d", "#65a30d", "#78716c", "#1e293b")
RAMP = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (222, 190, 20))  # viridis, its end darkened
LOG_FROM = 5  # highest by lowest value from which an axis is logarithmic
SHADED = 3  # lines up to which the range of each is drawn
DOTTED = 40  # points up to which each is drawn


@dataclasses.dataclass(frozen=True)
class Line:
    """A curve of a chart; lines of the same `color` (a key) look alike but for their dashes."""

    label: str
    curve: Curve
    color: str
    dashed: bool = False


def chart(lines: Sequence[Line], span: tuple[float, float], restarts: Sequence[float] = ()) -> str:
    """An SVG of some curves over steps, and its legend with the last values.

    A curve of many steps is the mean of each bucket, shaded from the lowest to the highest value where few curves are
    drawn. The axis is logarithmic where all values are positive and spread widely.

    Args:
      lines: at least one.
      span: first and last step of the axis.
      restarts: steps at which to draw a mark.
    """
    colors = _colors(lines)
    shade = len(lines) <= SHADED
    parts = [line.curve.points for line in lines]
    low = min(float((part[2] if shade else part[1]).min()) for part in parts)
    high = max(float((part[3] if shade else part[1]).max()) for part in parts)
    y = Axis(low, high, HEIGHT - BOTTOM, TOP, low > 0 and high / low >= LOG_FROM)
    x = Axis(*span, LEFT, WIDTH - RIGHT, False, tight=True)
    drawn = [_frame(x, y)]
    drawn += [
        f'<path class="mark" d="M{x(step):.1f},{TOP}V{HEIGHT - BOTTOM}"><title>started again at step {step:.0f}</title>'
        "</path>"
        for step in restarts
        if span[0] < step < span[1]
    ]
    for line, (steps, means, lows, highs) in zip(lines, parts, strict=True):
        color, across = colors[line.color], x(steps)
        if shade and line.curve.width > 1:
            outline = _path(np.concatenate([across, across[::-1]]), np.concatenate([y(lows), y(highs)[::-1]]))
            drawn.append(f'<path fill="{color}" opacity=".18" d="{outline}Z"/>')
        dash = ' stroke-dasharray="5 3"' if line.dashed else ""
        down, title = y(means), f"<title>{html.escape(line.label)}</title>"
        drawn.append(f'<path class="line" stroke="{color}"{dash} d="{_path(across, down)}">{title}</path>')
        if len(steps) <= DOTTED:
            drawn += [
                f'<circle cx="{a:.1f}" cy="{d:.1f}" r="2" fill="{color}"/>' for a, d in zip(across, down, strict=True)
            ]
    keys = "".join(
        f'<span><i class="{"dashed" if line.dashed else "solid"}" style="color:{colors[line.color]}"></i>'
        f"{html.escape(line.label)} <b>{number(line.curve.last)}</b></span>"
        for line in lines
    )
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}">{"".join(drawn)}</svg><div class="keys">{keys}</div>'


class Axis:
    """Maps values to pixels, and knows its round values."""

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

    def __call__(self, values):
        low, high = self.low, self.high
        if self.logarithmic:
            values, low, high = np.log(values), math.log(low), math.log(high)
        return self.begin + (np.asarray(values) - low) / (high - low) * (self.end - self.begin)

    def ticks(self) -> list[float]:
        """Some round values inside."""
        if not self.logarithmic:
            step = _round_up((self.high - self.low) / 5)
            return [step * n for n in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        factors = (1, 2, 5) if len(decades) <= 4 else (1,)
        ticks = [factor * 10.0**decade for decade in decades for factor in factors]
        ticks = [tick for tick in ticks if self.low <= tick <= self.high]
        return ticks[:: -(-len(ticks) // 9)] if ticks else []


def number(value: float) -> str:
    """A value in at most about six characters: 1234567 is 1.23M, 0.000012 is 1.2e-05."""
    size = abs(value)
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "K")):
        if limit <= size < 1e15:
            return f"{value / (1e3 if unit == 'K' else limit):.4g}{unit}"
    return f"{value:.4g}"


def _round_up(step: float) -> float:
    decade = 10.0 ** math.floor(math.log10(step))
    return next(factor * decade for factor in (1, 2, 5, 10) if factor * decade >= step * 0.999)


def _frame(x: Axis, y: Axis) -> str:
    grid = "".join(
        f'<path class="grid" d="M{LEFT},{y(tick):.1f}H{WIDTH - RIGHT}"/>'
        f'<text x="{LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{number(tick)}</text>'
        for tick in y.ticks()
    )
    ticks = [tick for tick in x.ticks() if tick == round(tick)]
    below = "".join(
        f'<text x="{x(tick):.1f}" y="{HEIGHT - 8}" text-anchor="middle">{number(tick)}</text>' for tick in ticks
    )
    log = f'<text x="{LEFT + 4}" y="{TOP + 10}">log</text>' if y.logarithmic else ""
    return f'{grid}{below}{log}<path class="axis" d="M{LEFT},{TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/>'


def _path(across: np.ndarray, down: np.ndarray) -> str:
    return "M" + "L".join(f"{a:.1f},{d:.1f}" for a, d in zip(across, down, strict=True))


def _colors(lines: Sequence[Line]) -> dict[str, str]:
    """A colour for each key: of a ramp where keys are numbers, as bins of t are."""
    keys = list(dict.fromkeys(line.color for line in lines))
    if (len(keys) > 2 and all(key.isdecimal() for key in keys)) or len(keys) > len(COLORS):
        places = np.linspace(0, len(RAMP) - 1, len(keys))
        channels = [np.interp(places, range(len(RAMP)), channel) for channel in zip(*RAMP, strict=True)]
        return {key: "#" + "".join(f"{int(c[i]):02x}" for c in channels) for i, key in enumerate(keys)}
    return dict(zip(keys, COLORS, strict=False))
