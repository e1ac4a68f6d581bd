"""Text files as editors and other programs write them: prompts, captions and metadata are all read here."""

import codecs
import os
import re

MAX_TEXT_BYTES = 64 << 20

# UTF-32 comes first because its little-endian mark begins with that of UTF-16.
_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_MARKS_AT_LINE_STARTS = re.compile("^\ufeff+", re.MULTILINE)


def read_text(source: str | os.PathLike[str] | bytes, max_bytes: int = MAX_TEXT_BYTES) -> str:
    r"""Text without byte-order marks and with `\n` as its only line end.

    The encoding is that of the byte-order mark (UTF-8, UTF-16 or UTF-32), and UTF-8 without one. `\r\n` and `\r` become
    `\n`. Other separators (U+2028, U+2029, U+0085) stay: they break a line within a text and never end a record, so
    JSON strings may contain them.

    Args:
      source: path of a file, or its content.
      max_bytes: largest content that is read.

    Raises:
      ValueError: for bytes that are not text in that encoding, text with U+0000 (a binary file, or UTF-16 without a
        mark), or more than `max_bytes`.
      OSError: if the file cannot be read.
    """
    if isinstance(source, bytes):
        name, data = "the text", source
    else:
        name = os.fspath(source)
        with open(source, "rb") as file:
            data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise ValueError(f"{name} is larger than {max_bytes} bytes; split it")
    mark, encoding = next(((mark, name) for mark, name in _BYTE_ORDER_MARKS if data.startswith(mark)), (b"", "utf-8"))
    try:
        text = data[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not {encoding.upper()} text ({error}); save it as UTF-8") from None
    if "\0" in text:
        raise ValueError(f"{name} contains U+0000: it is binary, or UTF-16 without a byte-order mark; save it as UTF-8")
    # Files that were joined from several keep the mark of each.
    return _MARKS_AT_LINE_STARTS.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))


def split_lines(text: str) -> list[str]:
    r"""The lines of a text from `read_text` that are not blank, without blanks at their ends, as in captions.

    Unlike `str.splitlines`, it splits at `\n` alone: a prompt with U+2028 inside stays one prompt, as a caption does.
    """
    return [line.strip() for line in text.split("\n") if line.strip()]
