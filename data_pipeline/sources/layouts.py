"""Maps the keys of tables and metadata files to our fields, for the names that public data sets and trainers use.

Our fields are `image` (in metadata files `file_name`), `text` or `captions`, `instruction`, `conditions`, `tags`,
`licence` and `key`. A published layout of edits is recognised by its keys. `--column FIELD=NAME` overrides all of this.
"""

import json
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from data_pipeline.sources.base import Refused

FIELDS = ("image", "text", "captions", "instruction", "conditions", "tags", "licence", "key")
_JOINED = ("instruction", "conditions")  # fields whose values may be spread over several keys


@dataclass(frozen=True)
class Layout:
    """Keys of a published data set of edits. A row has this layout if it has an image, a condition and an instruction.

    Attributes:
      name: name of the data set or trainer.
      image: key of the target image.
      conditions: keys of the condition images.
      instruction: keys of instructions.
      text: keys of general captions of the target.
      tags: keys of tags.
    """

    name: str
    image: str
    conditions: tuple[str, ...]
    instruction: tuple[str, ...]
    text: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()


_NUMBERED = re.compile(r"control_path_(\d{1,4})")
EDITS = (
    Layout("MagicBrush", "target_img", ("source_img",), ("instruction",)),
    Layout("OmniEdit", "edited_img", ("src_img",), ("edited_prompt_list",), tags=("task",)),
    Layout("InstructPix2Pix", "edited_image", ("original_image", "input_image"), ("edit_prompt",), ("edited_prompt",)),
    Layout("Pico-Banana", "output_image", ("local_input_image",), ("text", "summarized_text"), tags=("edit_type",)),
    Layout("DiffSynth-Studio", "image", ("edit_image",), ("prompt",)),
    Layout("musubi-tuner", "image_path", ("control_path", "control_path_N"), ("caption",)),
)
# Keys for an image and for a caption, in the order in which they are tried.
_IMAGES = ("file_name", "image", "image_path")
_TEXTS = ("text", "caption", "prompt")
_LICENCES = ("licence", "license")


def map_fields(present: Iterable[str], columns: Mapping[str, str], *, table: bool) -> dict[str, tuple[str, ...]]:
    """Returns {field: its keys} for a row or table; `image` is absent if no key names it.

    Args:
      present: keys of the row or table.
      columns: {field: key} from the user, which overrides the rest.
      table: whether rows contain the image itself rather than its file name.
    """
    keys = list(present)
    fields = _edit_layout(keys) or _pair_layout(keys, table)
    if "text" in columns:
        fields.pop("captions", None)
    return fields | {field: (key,) for field, key in columns.items() if key in keys}


def _edit_layout(keys: Collection[str]) -> dict[str, tuple[str, ...]] | None:
    numbered = sorted((match for key in keys if (match := _NUMBERED.fullmatch(key))), key=lambda match: int(match[1]))
    for layout in EDITS:
        conditions = [key for key in layout.conditions if key in keys]
        if "control_path_N" in layout.conditions:
            conditions += [match[0] for match in numbered]
        instruction = [key for key in layout.instruction if key in keys]
        if layout.image in keys and conditions and instruction:
            parts = {"image": (layout.image,), "conditions": conditions, "instruction": instruction}
            parts |= {"text": layout.text, "tags": layout.tags, "licence": _LICENCES, "key": ("key",)}
            present = {field: tuple(key for key in names if key in keys) for field, names in parts.items()}
            return {field: names for field, names in present.items() if names}
    return None


def _pair_layout(keys: Collection[str], table: bool) -> dict[str, tuple[str, ...]]:
    fields: dict[str, tuple[str, ...]] = {field: (field,) for field in FIELDS if field in keys and field != "image"}
    image = next((key for key in (("image",) if table else _IMAGES) if key in keys), None)
    if image is not None:
        fields["image"] = (image,)
    if "captions" not in fields and (texts := tuple(key for key in _TEXTS if key in keys)):
        fields["text"] = texts
    if licences := tuple(key for key in _LICENCES if key in keys):
        fields["licence"] = licences
    return fields


def is_blank(value: Any) -> bool:
    """Whether a value says nothing: null, blank text, or an empty list or object."""
    return value is None or (isinstance(value, str) and not value.strip()) or value in ([], {})


def without_blanks(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if not is_blank(value)}


def unused_keys(row: Mapping[str, Any], fields: Mapping[str, tuple[str, ...]]) -> list[str]:
    """The keys of a row whose values `read_values` does not return; blank values do not count."""
    filled = without_blanks(row)
    used = set()
    for field, keys in fields.items():
        present = [key for key in keys if key in filled]
        used.update(present if field in _JOINED else present[:1])
    return [key for key in filled if key not in used]


def read_values(row: Mapping[str, Any], fields: Mapping[str, tuple[str, ...]]) -> dict[str, Any]:
    """Returns {field: value} of a row, without blank values. A list in `text` becomes `captions`.

    If a field has several keys, the first of them whose value is not blank counts.
    """
    row_values: dict[str, Any] = {}
    for field, keys in fields.items():
        values = [row[key] for key in keys if not is_blank(row.get(key))]
        if field in _JOINED:
            values = [part for value in values for part in _parts(value, field)]
            row_values |= {field: values} if values else {}
        elif values:
            row_values[field] = values[0]
    if isinstance(row_values.get("text"), list) and "captions" not in row_values:
        row_values["captions"] = row_values.pop("text")
    return row_values


def _parts(value: Any, field: str) -> list[Any]:
    if field == "conditions" and isinstance(value, str) and value.startswith("["):
        try:  # a CSV cell with a list of images
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise Refused("bad_metadata") from None
    return value if isinstance(value, list) else [value]


def check_columns(columns: Mapping[str, str], present: Iterable[str], where: str) -> None:
    """Raises a ValueError for unknown fields and for missing columns."""
    keys = sorted(set(present))
    unknown = sorted(set(columns) - set(FIELDS))
    if unknown:
        raise ValueError(f"--column names the unknown fields {unknown}; the fields are {', '.join(FIELDS)}")
    absent = sorted(set(columns.values()) - set(keys))
    if absent:
        raise ValueError(f"{where} lacks {', '.join(map(repr, absent))}; it has {format_keys(keys)}")


def format_keys(keys: Iterable[str]) -> str:
    """A list of keys for a message, at most 20 of them."""
    names = [repr(key)[:60] for key in keys]
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
