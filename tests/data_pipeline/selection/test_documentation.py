"""docs/data.md lists the thresholds that the filters declare."""

import dataclasses
from pathlib import Path

from data_pipeline.selection import documentation
from data_pipeline.selection.thresholds import DECLARED, Thresholds

DOCUMENT = Path(__file__).parents[3] / "docs/data.md"


def test_the_table_is_up_to_date():
    text = DOCUMENT.read_text(encoding="utf-8")
    assert documentation.inserted(text) == text, "run python -m data_pipeline.selection.documentation"
    for name in DECLARED:
        assert f"| `{name}` |" in text


def test_every_threshold_is_declared_once_and_becomes_a_field():
    fields = {field.name: field.default for field in dataclasses.fields(Thresholds)}
    assert fields == {name: one.default for name, one in DECLARED.items()} | {"require": ()}
    for one in DECLARED.values():
        assert one.meaning and (one.low is None) == isinstance(one.default, bool | str)
        assert one.low is None or one.low <= one.default <= one.high
