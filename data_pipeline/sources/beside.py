"""The files of one sample that share a name: a JSON file, and text files with captions."""

from collections.abc import Sequence
from dataclasses import replace

from data_pipeline.sources import layouts
from data_pipeline.sources.base import Options, Refused
from data_pipeline.sources.fields import Described, Text, describe, parse_json


def describe_files(json_file: bytes | Refused | None, texts: Sequence[Text], options: Options) -> Described:
    """Describes a sample by all of its files. A JSON file that cannot be used matters only without a text file.

    Captions under our own keys, `text` and `captions`, are kept beside those of text files. Captions under other keys,
    as img2dataset writes them, usually repeat the text file and are used only if there is no text in one.

    Raises:
      Refused: if there is no usable caption; it names the keys of the JSON file if none of them holds a caption.
    """
    row, problem = {}, None
    try:
        if isinstance(json_file, Refused):
            raise json_file
        row = {} if json_file is None else parse_json(json_file)
        fields = layouts.values_of(row, layouts.fields_of(row, options.columns, table=False))
    except Refused as refusal:
        fields, problem = {}, refusal
    if any(isinstance(text.content, str) and text.content.strip() for text in texts):
        fields = {name: value for name, value in fields.items() if name not in ("text", "captions") or name in row}
    try:
        described = describe(fields, options.licence, texts)
    except Refused as refusal:
        if problem is not None and not texts:
            raise problem from None
        if refusal.reason == "missing_caption" and row and not texts:
            raise Refused(refusal.reason, f"keys {layouts.listing(row)}") from None
        raise
    return described if problem is None else replace(described, lost=(*described.lost, problem.reason))
