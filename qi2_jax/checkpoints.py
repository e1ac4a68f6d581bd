"""`qi2 checkpoints DIR`: what a run has saved, whether it is whole, and which of it is kept for ever."""

import argparse
import datetime
import pathlib
import sys
from typing import Any

import rich.box
from rich.console import Console
from rich.table import Table

from data_pipeline.atomic import write_json_atomic
from qi2_jax import cli, places
from qi2_jax.training import checkpoint_files as files
from qi2_jax.training import integrity, retention

_WITHIN = ("", places.CHECKPOINTS, f"{places.TRANSFORMER}/{places.CHECKPOINTS}")  # of a folder, a run, a job
_METRICS = ("loss", "validation_loss")
_ATTEMPTS = 5


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
    path = places.run_of(path)
    for name in _WITHIN:
        if files.steps(path / name) or files.aside(path / name):
            return path / name
    raise ValueError(f"{path} holds no complete checkpoint; looked for STEP/ in {[str(path / n) for n in _WITHIN]}")


def listing(directory: pathlib.Path) -> dict[str, Any]:
    """The complete checkpoints of a folder as plain JSON, ascending, and the names of the damaged ones set aside."""
    for _ in range(_ATTEMPTS):
        try:
            return _listing(directory)
        except FileNotFoundError:  # a run that trains in the folder deleted one while it was looked at
            continue
    return _listing(directory)


def _listing(directory: pathlib.Path) -> dict[str, Any]:
    steps = files.steps(directory)
    policy = _policy(directory, steps)
    why = retention.reasons(directory, policy) if policy else {}
    marked = files.marked(directory)
    listed = []
    for step in steps:
        path = directory / str(step)
        listed.append(
            {
                "step": step,
                "saved": datetime.datetime.fromtimestamp(files.saved_at(path), datetime.UTC).isoformat("T", "seconds"),
                "bytes": sum(files.files(path).values()),
                "metrics": {name: files.metric(path, name) for name in _METRICS},
                "marked": step in marked,
                "kept": why.get(step, ["marked"] if step in marked else []),
                "verified": integrity.is_verified(path),
            }
        )
    return {"checkpoints": listed, "damaged": files.aside(directory)}


def _policy(directory: pathlib.Path, steps: list[int]) -> retention.Policy | None:
    """The policy that the newest manifest speaks of; None where it does not."""
    try:
        return retention.Policy.of_config(files.manifest(directory / str(steps[-1]))["config"]["checkpoint"])
    except (IndexError, KeyError, TypeError, ValueError):
        return None


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


def inspect(directory: pathlib.Path, step: int) -> dict[str, Any]:
    """The items of a step with their leaves, parameters, bytes and dtypes; its manifest; what changed in the config.

    Raises:
      ValueError: if there is no such step.
    """
    _check(directory, [step])
    import jax

    from qi2_jax import config as configs
    from qi2_jax.training import checkpoint_contents

    jax.config.update("jax_platforms", "cpu")  # Orbax asks for devices; those of a TPU belong to the run

    path = directory / str(step)
    items = {}
    for item, leaves in checkpoint_contents.contents(path).items():
        items[item] = {
            "leaves": len(leaves),
            "parameters": sum(leaf.size for leaf in leaves.values()),
            "bytes": sum(leaf.size * leaf.dtype.itemsize for leaf in leaves.values()),
            "dtypes": sorted({str(leaf.dtype) for leaf in leaves.values()}),
        }
    manifest = files.manifest(path)
    before = [other for other in files.steps(directory) if other < step]
    changes = None
    if before and "config" in manifest:
        earlier = files.manifest(directory / str(before[-1])).get("config")
        changes = None if earlier is None else configs.difference(earlier, manifest["config"])
    return {
        "step": step,
        "items": items,
        "manifest": manifest,
        "compared_to": before[-1] if before else None,
        "config_changes": changes,
        "verified": integrity.is_verified(path),
    }


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


def verify(directory: pathlib.Path, steps: list[int]) -> dict[int, list[str] | None]:
    """What is wrong with the files of each step (default: of all): [] if nothing, None where there are no checksums.

    Steps that a run deletes while they are read are left out.

    Raises:
      ValueError: for a step that does not exist.
    """
    _check(directory, steps)
    found: dict[int, list[str] | None] = {}
    for step in steps or files.steps(directory):
        path = directory / str(step)
        try:
            wrong = integrity.problems(path)
            verified = integrity.is_verified(path)
        except FileNotFoundError:
            if path.is_dir():
                raise
        if path.is_dir():
            found[step] = wrong if wrong or verified else None
    return found


def _check(directory: pathlib.Path, steps: list[int]) -> None:
    if unknown := sorted(set(steps) - set(files.steps(directory))):
        raise ValueError(f"{directory} has no checkpoints of the steps {unknown}, only {files.steps(directory)}")


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


if __name__ == "__main__":
    cli.main(["checkpoints", *sys.argv[1:]])
