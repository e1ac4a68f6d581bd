"""`qi2 checkpoints DIR`: what a run has saved, whether it is whole, and which of it is kept for ever."""

import argparse
import pathlib
from typing import Any

import rich.box
from rich.console import Console
from rich.table import Table

from qi2_jax.runs import paths
from qi2_jax.runtime.atomic import write_json_atomic
from qi2_jax.training.checkpoints import files
from qi2_jax.training.checkpoints.inspection import _METRICS, inspect, listing, verify

_WITHIN = ("", paths.CHECKPOINTS, f"{paths.TRANSFORMER}/{paths.CHECKPOINTS}")  # of a folder, a run, a job


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder",
        type=pathlib.Path,
        metavar="DIR",
        help="a run, a job, a curriculum (its latest stage), or a folder of checkpoints",
    )
    actions = parser.add_mutually_exclusive_group()
    actions.add_argument("--inspect", type=int, metavar="STEP", help="what one checkpoint holds, and its manifest")
    actions.add_argument(
        "--verify", type=int, nargs="*", metavar="STEP", help="read all files of these steps (default: of all) again"
    )
    actions.add_argument("--keep", type=int, metavar="STEP", help="keep this checkpoint for ever")
    actions.add_argument("--unkeep", type=int, metavar="STEP", help="let the run's policy decide about it again")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="also write the figures to this file")


def folder_of(path: pathlib.Path) -> pathlib.Path:
    """The checkpoints of a run, of a job's transformer, of a curriculum's latest stage, or the folder itself.

    Raises:
      ValueError: if none of them holds a checkpoint.
    """
    path = paths.run_of(path)
    for name in _WITHIN:
        if files.steps(path / name) or files.aside(path / name):
            return path / name
    raise ValueError(f"{path} holds no complete checkpoint; looked for STEP/ in {[str(path / n) for n in _WITHIN]}")


def _table(listed: dict[str, Any]) -> Table:
    table = Table(
        *("step", "saved (UTC)", "size", "loss", "validation", "kept as", "checksums"),
        box=rich.box.SIMPLE,
        pad_edge=False,
        padding=0,
    )
    for column in table.columns:
        column.no_wrap = column.header != "kept as"
    for row in listed["checkpoints"]:
        values = ["" if (value := row["metrics"][name]) is None else f"{value:.4f}" for name in _METRICS]
        saved = row["saved"][:16].replace("T", " ")
        state = "complete" if row["verified"] else "unverified"
        table.add_row(str(row["step"]), saved, _size(row["bytes"]), *values, ", ".join(row["kept"]), state)
    return table


def _size(count: int) -> str:
    for scale, unit in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} bytes"


def _show(found: dict[str, Any], console: Console) -> None:
    table = Table("item", "leaves", "parameters", "dtypes", "in memory", title=f"step {found['step']}")
    for name, item in found["items"].items():
        dtypes = ", ".join(item["dtypes"])
        table.add_row(name, f"{item['leaves']:,}", f"{item['parameters']:,}", dtypes, _size(item["bytes"]))
    console.print(table)
    told = {key: value for key, value in found["manifest"].items() if key != "config"}
    console.print_json(data=told) if told else console.print("no manifest")
    if found["config_changes"] is not None:
        same = "the config is that of" if not found["config_changes"] else "config changes since"
        console.print(f"{same} step {found['compared_to']}", *found["config_changes"], sep="\n  ", markup=False)


def main(arguments: argparse.Namespace) -> None:
    directory, console = folder_of(arguments.folder), Console()
    wrong: list[str] = []
    if arguments.inspect is not None:
        figures = inspect(directory, arguments.inspect)
        _show(figures, console)
    elif arguments.verify is not None:
        asked = arguments.verify or files.steps(directory)
        found = verify(directory, asked)
        for step in asked:
            if step not in found:
                console.print(f"step {step}: deleted meanwhile")
        for step, lines in found.items():
            console.print(f"step {step}: {'unverified' if lines is None else 'damaged' if lines else 'whole'}")
            wrong += [f"{directory / str(step)}: {line}" for line in lines or []]
        figures = {"steps": {str(step): lines for step, lines in found.items()}}
    else:
        if arguments.keep is not None:
            files.keep(directory, arguments.keep)
        if arguments.unkeep is not None:
            files.unkeep(directory, arguments.unkeep)
        figures = listing(directory)
        console.print(_table(figures))
        for name in figures["damaged"]:
            console.print(
                f"{directory / name} is set aside: it was damaged. Delete it when nothing is to be saved from it."
            )
    if arguments.json is not None:
        write_json_atomic(arguments.json, figures)
    if wrong:
        raise ValueError("damaged files:\n  " + "\n  ".join(wrong))
