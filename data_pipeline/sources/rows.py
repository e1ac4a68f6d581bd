"""Rows of metadata files: JSON lines, a JSON list, or a CSV table. A row that cannot be read costs only itself."""

import codecs
import csv
import json
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_pipeline.sources.base import Ledger, Refused
from data_pipeline.sources.fields import MAX_JSON_BYTES, parse_json
from qi2_jax.runtime.text_files import read_text

MAX_LIST_BYTES = 256 << 20  # a JSON list, which is read as a whole
MAX_ROW_LINES = 1000  # of one CSV row, whose quoted cells may span lines
_NOT_TEXT = "\udcff"  # stands for bytes that are not text; no text contains it
codecs.register_error("qi2.not_text", lambda error: (_NOT_TEXT, error.end))  # type: ignore[attr-defined]

Row = dict[str, Any] | Refused


def read_rows(path: Path, name: str, ledger: Ledger) -> Iterator[tuple[str, Row]]:
    """Yields the rows of a file, each with its place for messages.

    Args:
      path: path of the file; its suffix is that of `name`.
      name: name of the file for messages.
      ledger: counts of the source, for a file that cannot be read.
    """
    readers = {".csv": _csv_rows, ".json": _json_rows}
    try:
        yield from readers.get(Path(name).suffix.lower(), _json_lines)(path, name)
    except OSError:
        ledger.refuse("unreadable", name)


def _json_lines(path: Path, name: str) -> Iterator[tuple[str, Row]]:
    for number, line in _lines(path):
        if line is None:
            yield f"{name}:{number}", Refused("bad_json")
        elif line.strip():
            yield f"{name}:{number}", _parse_line(line)


def _parse_line(line: str) -> Row:
    try:
        return parse_json(line.encode(errors="surrogatepass"))
    except Refused as error:
        return error


def _json_rows(path: Path, name: str) -> Iterator[tuple[str, Row]]:
    try:
        rows = json.loads(read_text(path, MAX_LIST_BYTES))
    except (ValueError, RecursionError):
        yield name, Refused("bad_json")
        return
    for number, row in enumerate(rows if isinstance(rows, list) else [rows]):
        yield f"{name}:{number}", row if isinstance(row, dict) else Refused("bad_json")


def _csv_rows(path: Path, name: str) -> Iterator[tuple[str, Row]]:
    csv.field_size_limit(max(csv.field_size_limit(), MAX_JSON_BYTES))
    header: list[str] | None = None
    for number, cells in _csv_cells(path):
        where = f"{name}:{number}"
        if isinstance(cells, Refused):
            yield where, cells
        elif cells and header is None:
            header = cells
        elif any(_NOT_TEXT in cell for cell in cells):
            yield where, Refused("not_utf8")
        elif cells and header is not None:
            yield where, {key: value for key, value in zip(header, cells, strict=False) if key}


def _csv_cells(path: Path) -> Iterator[tuple[int, list[str] | Refused]]:
    """Yields the cells of each row, with the number of its first line.

    A row spans several lines if a quoted cell does. If the quote is never closed properly, the row is refused, and the
    lines after its first one are read as rows of their own.
    """
    lines = _lines(path)
    waiting: deque[tuple[int, str | None]] = deque()  # lines that were read in search of the end of a quote
    while first := (waiting.popleft() if waiting else next(lines, None)):
        number, text = first
        if text is None:
            yield number, Refused("broken_row")
            continue
        taken = [first]
        try:
            cells: list[str] | Refused = next(csv.reader(_row_lines(taken, waiting, lines), strict=True), [])
        except csv.Error:  # text after a closing quote does no harm
            cells = next(csv.reader([text])) if len(taken) == 1 else Refused("broken_row")
            waiting.extendleft(reversed(taken[1:]))
        yield number, cells


def _row_lines(
    taken: list[tuple[int, str | None]], waiting: deque[tuple[int, str | None]], lines: Iterator[tuple[int, str | None]]
) -> Iterator[str]:
    """Yields the lines that a row may span, and adds them to `taken`, which begins with the first."""
    characters = 0
    while (text := taken[-1][1]) is not None and characters + len(text) <= MAX_JSON_BYTES:
        yield text
        characters += len(text)
        line = waiting.popleft() if waiting else next(lines, None)
        if line is None or len(taken) == MAX_ROW_LINES:
            waiting.extendleft([line] if line else [])
            return
        taken.append(line)


def _lines(path: Path) -> Iterator[tuple[int, str | None]]:
    r"""Yields the numbered lines of a text file, in bounded memory; None for a line that is too long.

    Lines end with `\n`, `\r\n` or `\r`, as in `read_text`. Bytes that are not text become `_NOT_TEXT`.
    """
    with open(path, encoding=_encoding(path), errors="qi2.not_text") as file:
        number = 0
        while line := file.readline(MAX_JSON_BYTES + 1):
            number += 1
            if len(line) <= MAX_JSON_BYTES:
                yield number, line.lstrip("\ufeff")
                continue
            while line and not line.endswith("\n"):
                line = file.readline(MAX_JSON_BYTES)
            yield number, None


def _encoding(path: Path) -> str:
    with open(path, "rb") as file:
        start = file.read(4)
    if start in (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE):
        return "utf-32"
    return "utf-16" if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8"
