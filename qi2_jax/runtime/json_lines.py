"""JSON lines: one JSON object per line, appended while a program runs."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


def dump(values: Mapping[str, Any]) -> str:
    """One line with its line end.

    Raises:
      ValueError: for NaN and infinity, which JSON does not have.
    """
    return json.dumps(values, allow_nan=False) + "\n"


def parse(line: str | bytes) -> dict[str, Any] | None:
    """The object of a line, or None for anything else, such as a line that a killed process left unfinished."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file in order; truncated and foreign lines are left out.

    Raises:
      FileNotFoundError: if there is no such file.
    """
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            if (value := parse(line)) is not None:
                yield value
