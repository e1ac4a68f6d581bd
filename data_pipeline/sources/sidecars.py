"""Sidecar files: the JSON file and the caption files that share the name of an image."""

from collections.abc import Sequence
from dataclasses import replace

from data_pipeline.sources import layouts
from data_pipeline.sources.base import Ledger, Options, Refused
from data_pipeline.sources.fields import CaptionFile, Description, describe, parse_json


def describe_sidecars(
    json_file: bytes | Refused | None, texts: Sequence[CaptionFile], options: Options, ledger: Ledger
) -> Description:
    """Describes a sample by its sidecar files. A broken JSON file matters only if there is no caption file.

    Captions under our own keys, `text` and `captions`, are added to those of caption files. Captions under other keys,
    as img2dataset writes them, usually repeat the caption file; they are used only if no caption file has text.

    Raises:
      Refused: if there is no usable caption and the options require one; the detail lists the keys of a JSON file
        without captions.
    """
    row, problem = {}, None
    try:
        if isinstance(json_file, Refused):
            raise json_file
        row = {} if json_file is None else parse_json(json_file)
        filled = layouts.without_blanks(row)
        keys = layouts.map_fields(filled, options.columns, table=False)
        fields = layouts.read_values(filled, keys)
        ledger.count_unused(layouts.unused_keys(filled, keys))
    except Refused as refusal:
        fields, problem = {}, refusal
    if any(isinstance(text.content, str) and text.content.strip() for text in texts):
        fields = {name: value for name, value in fields.items() if name not in ("text", "captions") or name in row}
    try:
        described = describe(fields, options, texts)
    except Refused as refusal:
        if problem is not None and not texts:
            raise problem from None
        if refusal.reason == "missing_caption" and row and not texts:
            raise Refused(refusal.reason, f"keys {layouts.format_keys(row)}") from None
        raise
    return described if problem is None else replace(described, lost=(*described.lost, problem.reason))
