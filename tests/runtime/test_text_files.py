"""Text files of every common encoding and line end are read alike."""

import codecs

import pytest

from qi2_jax.runtime.text_files import read_text, split_lines

TEXT = "a lighthouse\nein Schloß\n一个茶壶"


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize(
    ("mark", "encoding"),
    [
        (b"", "utf-8"),
        (codecs.BOM_UTF8, "utf-8"),
        (codecs.BOM_UTF16_LE, "utf-16-le"),
        (codecs.BOM_UTF16_BE, "utf-16-be"),
        (codecs.BOM_UTF32_LE, "utf-32-le"),
        (codecs.BOM_UTF32_BE, "utf-32-be"),
    ],
)
def test_marks_and_line_ends_do_not_change_the_text(mark, encoding, end, tmp_path):
    data = mark + TEXT.replace("\n", end).encode(encoding)
    (tmp_path / "a.txt").write_bytes(data)
    assert read_text(data) == read_text(tmp_path / "a.txt") == TEXT
    assert split_lines(read_text(data + end.encode(encoding) * 2)) == TEXT.split("\n")


def test_marks_of_joined_files_are_removed():
    assert read_text("\ufeffa\n\ufeffb\n".encode()) == "a\nb\n"


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c"])
def test_other_separators_stay_inside_a_line(separator):
    text = f"above{separator}below"
    assert split_lines(read_text(f"{text}\nnext\n".encode())) == [text, "next"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"caf\xe9", "the text is not UTF-8 text .*save it as UTF-8"),
        (codecs.BOM_UTF16_LE + b"a", "the text is not UTF-16-LE text"),
        ("a teapot".encode("utf-16-le"), r"contains U\+0000"),
        (b"a\0b", r"contains U\+0000"),
        (b"abcde", "larger than 4 bytes"),
    ],
)
def test_what_is_no_text_is_refused_with_the_way_out(data, message):
    with pytest.raises(ValueError, match=message):
        read_text(data, max_bytes=4 if data == b"abcde" else 100)


def test_an_unreadable_file_is_named(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"latin\.txt is not UTF-8 text"):
        read_text(tmp_path / "latin.txt")
    with pytest.raises(OSError, match=r"missing\.txt"):
        read_text(tmp_path / "missing.txt")


def test_prompts_lose_blanks_at_their_ends_as_captions_do():
    assert split_lines(read_text(b" a cat \r\n\t\n\ta dog")) == ["a cat", "a dog"]
