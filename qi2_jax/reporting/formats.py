"""Numbers, times and durations as the page of a run shows them."""

import datetime
import math
from typing import Any


def number(value: float) -> str:
    """A value in at most about six characters: 1234567 is 1.235M, 0.000012 is 1.2e-05."""
    size = abs(value)
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "K")):
        if limit <= size < 1e15:
            return f"{value / (1e3 if unit == 'K' else limit):.4g}{unit}"
    return f"{value:.4g}"


def number_or_dash(value: float | None) -> str:
    return "–" if value is None else number(value)


def percent_or_dash(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def is_number(value: Any) -> bool:
    """Whether a value of a JSON file is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def moment(seconds: float) -> str:
    """UTC date and time of seconds since 1970."""
    try:
        return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S")
    except (ValueError, OverflowError, OSError):
        return "?"


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    for limit, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * limit:
            return f"{seconds / limit:.1f} {unit}"
    return f"{seconds:.3g} s"
