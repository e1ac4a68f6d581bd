import pytest

from qi2_jax.runtime import json_lines


def test_lines_that_are_cut_or_foreign_are_left_out(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"a": 1}\n[2]\n\n{"b": "\xc3\xa4"}\n\xff\xfe\n' + b"[" * 100_000 + b'\n{"c"')
    assert list(json_lines.read(path)) == [{"a": 1}, {"b": "ä"}]


def test_a_line_is_one_line_of_json():
    assert json_lines.dump({"text": "a\nb"}) == '{"text": "a\\nb"}\n'
    with pytest.raises(ValueError, match="JSON"):
        json_lines.dump({"loss": float("nan")})
