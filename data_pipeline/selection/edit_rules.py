"""What selection asks of edits: of their instructions, and of their pictures by the class that their tags name.

| tag               | the target must                                                                           |
| ----------------- | ----------------------------------------------------------------------------------------- |
| `edit/local`      | show the source's scene, in its place, changed in some part and equal in the rest         |
| `edit/global`     | show the source's scene, in its place, changed anywhere                                   |
| `edit/background` | have the source's shape                                                                   |
| `edit/compose`    | have instructions that name all of several sources                                        |
| none of these     | differ from its source: of an edit that says nothing of its class nothing more is known   |
"""

from typing import TYPE_CHECKING

from data_pipeline.filters.edit_pair import EDIT_PAIR

if TYPE_CHECKING:
    from data_pipeline.selection.thresholds import Thresholds


def instruction_reason(row: dict, own: dict, thresholds: "Thresholds") -> str | None:
    """Why an instruction does not fit its edit; None: it does.

    Args:
      row: scores of the record.
      own: of these, the columns `instruction.*` of this one instruction.
    """
    count = row["description.conditions"]
    if own["instruction.last_source"] > count:
        return "names_missing_source"
    composed = count > 1 and "edit/compose" in row["description.tags"]
    if thresholds.name_sources and composed and own["instruction.sources"] < count:
        return "source_not_named"
    script = own["instruction.script"]
    return "other_script" if script is not None and script < thresholds.min_script else None


def edit_reason(row: dict, thresholds: "Thresholds") -> str | None:
    """Why the pictures of an edit do not fit each other; None: they do, or it is an image-text pair."""
    if not row["description.conditions"]:
        return None
    local, whole, ground = (f"edit/{name}" in row["description.tags"] for name in ("local", "global", "background"))
    pair = {name: row[f"edit_pair.{name}"] for name in EDIT_PAIR.columns}
    if pair["changed"] < thresholds.min_changed and (local or pair["difference"] < thresholds.min_difference):
        return "nothing_changes"
    if pair["repeated_source"]:
        return "repeated_source"
    if (local or whole or ground) and pair["aspect"] > thresholds.max_edit_aspect:
        return "other_shape"
    if (local or whole) and pair["shared"] is not None:
        if pair["shared"] < thresholds.min_shared:
            return "other_scene"
        if pair["shift"] > thresholds.max_shift:
            return "shifted"
    if local and pair["changed"] > thresholds.max_changed:
        return "everything_changes"
    psnr = pair["unchanged_psnr"]
    return "unchanged_region_differs" if local and psnr is not None and psnr < thresholds.min_unchanged_psnr else None
