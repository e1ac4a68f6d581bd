"""`qi2 checkpoints DIR`: which checkpoints a run has, whether they are complete, and which are kept forever."""

import argparse
import pathlib
from typing import TYPE_CHECKING, Any

from qi2_jax.cli import options

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder",
        type=pathlib.Path,
        metavar="DIR",
        help="a run, a job, a curriculum (its latest stage), or a folder of checkpoints",
    )
    actions = parser.add_mutually_exclusive_group()
    actions.add_argument("--inspect", type=int, metavar="STEP", help="show the contents and the manifest of one step")
    actions.add_argument(
        "--verify",
        type=int,
        nargs="*",
        metavar="STEP",
        help="compare all files of these steps with their checksums (default: all steps)",
    )
    actions.add_argument("--keep", type=int, metavar="STEP", help="keep this checkpoint forever")
    actions.add_argument(
        "--unkeep", type=int, metavar="STEP", help="remove the mark of --keep; the retention policy applies again"
    )
    parser.add_argument("--json", type=options.output_file, metavar="FILE", help="also write the figures to this file")


def folder_of(path: pathlib.Path) -> pathlib.Path:
    """Returns the folder of checkpoints of a run, of a job's transformer, or of a curriculum's latest stage.

    Args:
      path: one of these, or the folder itself.

    Raises:
      ValueError: if there is no checkpoint.
    """
    from qi2_jax.runs import paths
    from qi2_jax.training.checkpoints import files

    path = paths.run_of(path)
    places = [path / name for name in ("", paths.CHECKPOINTS, f"{paths.TRANSFORMER}/{paths.CHECKPOINTS}")]
    for place in places:
        if files.steps(place) or files.damaged(place):
            return place
    raise ValueError(f"{path} has no complete checkpoint; looked for STEP/ in {[str(place) for place in places]}")


def main(arguments: argparse.Namespace) -> None:
    from rich.console import Console

    from qi2_jax.runtime import outputs
    from qi2_jax.runtime.atomic import write_json_atomic
    from qi2_jax.training.checkpoints import files, inspection

    outputs.check_json(arguments.json)
    directory, console = folder_of(arguments.folder), Console()
    damaged: list[str] = []
    if arguments.inspect is not None:
        figures = inspection.inspect(directory, arguments.inspect)
        _show_contents(figures, console)
    elif arguments.verify is not None:
        figures, damaged = _verify(directory, arguments.verify, console)
    else:
        if arguments.keep is not None:
            files.keep(directory, arguments.keep)
        if arguments.unkeep is not None:
            files.unkeep(directory, arguments.unkeep)
        figures = inspection.listing(directory)
        console.print(_table(figures))
        for name in figures["damaged"]:
            console.print(
                f"{directory / name} is set aside because it was damaged. Delete it when you no longer need it."
            )
    if arguments.json is not None:
        write_json_atomic(arguments.json, figures)
    if damaged:
        raise ValueError("damaged files:\n  " + "\n  ".join(damaged))


def _verify(directory: pathlib.Path, requested: list[int], console: "Console") -> tuple[dict[str, Any], list[str]]:
    from qi2_jax.training.checkpoints import files, inspection

    steps = requested or files.steps(directory)
    problems = inspection.verify(directory, steps)
    for step in steps:
        if step not in problems:
            console.print(f"step {step}: deleted meanwhile")
    damaged = []
    for step, lines in problems.items():
        console.print(f"step {step}: {'unverified' if lines is None else 'damaged' if lines else 'intact'}")
        damaged += [f"{directory / str(step)}: {line}" for line in lines or []]
    return {"steps": {str(step): lines for step, lines in problems.items()}}, damaged


def _table(listed: dict[str, Any]) -> "Table":
    import rich.box
    from rich.table import Table

    from qi2_jax.training.checkpoints.inspection import METRICS

    table = Table(
        *("step", "saved (UTC)", "size", "loss", "validation", "kept as", "checksums"),
        box=rich.box.SIMPLE,
        pad_edge=False,
        padding=0,
    )
    for column in table.columns:
        column.no_wrap = column.header != "kept as"
    for row in listed["checkpoints"]:
        values = ["" if (value := row["metrics"][name]) is None else f"{value:.4f}" for name in METRICS]
        saved = row["saved"][:16].replace("T", " ")
        state = "complete" if row["verified"] else "unverified"
        table.add_row(str(row["step"]), saved, _size(row["bytes"]), *values, ", ".join(row["kept"]), state)
    return table


def _size(count: int) -> str:
    for scale, unit in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} bytes"


def _show_contents(contents: dict[str, Any], console: "Console") -> None:
    from rich.table import Table

    table = Table("item", "leaves", "parameters", "dtypes", "in memory", title=f"step {contents['step']}")
    for name, item in contents["items"].items():
        dtypes = ", ".join(item["dtypes"])
        table.add_row(name, f"{item['leaves']:,}", f"{item['parameters']:,}", dtypes, _size(item["bytes"]))
    console.print(table)
    manifest = {key: value for key, value in contents["manifest"].items() if key != "config"}
    console.print_json(data=manifest) if manifest else console.print("no manifest")
    if contents["config_changes"] is not None:
        heading = "config changes since" if contents["config_changes"] else "the config is that of"
        console.print(
            f"{heading} step {contents['compared_to']}", *contents["config_changes"], sep="\n  ", markup=False
        )
