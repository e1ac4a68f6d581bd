"""Checks that an output does not lie where a command reads. Imports no other module of qi2."""

import pathlib
from collections.abc import Iterator

MARKS = ("qi2.json", "job.json", "curriculum.json")  # files of a model folder, a job and a curriculum
RECORDS = (*MARKS, "config.json", "manifest.json", "model_index.json")  # JSON files that qi2 reads


def check_outside(
    out: pathlib.Path, *sources: pathlib.Path | None, flag: str = "--out", allowed_suffix: str | None = None
) -> None:
    """Checks that a file or folder can be written without changing what is read. Links are resolved.

    Args:
      out: file or folder to write.
      sources: inputs, or folders owned by other commands; None is skipped.
      flag: argument that names `out`.
      allowed_suffix: suffix that is allowed inside a source, such as ".html"; "" = any, None = none.

    Raises:
      ValueError: if `out` is one of the sources, or lies in one and `allowed_suffix` does not allow it.
    """
    for source in filter(None, sources):
        if out.resolve() == source.resolve():
            raise ValueError(f"{flag} {out} is {source}, which is only read; choose another path")
        if out.resolve().is_relative_to(source.resolve()) and (
            allowed_suffix is None or not out.name.endswith(allowed_suffix)
        ):
            allowed = f", or a name that ends in {allowed_suffix}" if allowed_suffix else ""
            raise ValueError(f"{flag} {out} lies in {source}, which is only read; choose a path outside of it{allowed}")


def check_json(out: pathlib.Path | None) -> None:
    """Raises a ValueError if the file of `--json` would replace a record that qi2 reads, such as `job.json`."""
    if out is not None:
        check_outside(out, *(out.parent / name for name in RECORDS if (out.parent / name).exists()), flag="--json")


def owners(out: pathlib.Path) -> Iterator[pathlib.Path]:
    """The folders above `out` that are a run, a job, a curriculum or a model folder."""
    for folder in out.resolve().parents:
        is_run = (folder / "checkpoints").is_dir() and any(
            (folder / name).exists() for name in ("config.json", "model")
        )
        if is_run or any((folder / name).is_file() for name in MARKS):
            yield folder
