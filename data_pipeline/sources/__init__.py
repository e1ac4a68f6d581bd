"""Where records come from: one file per kind of source, each a reader that counts what it refuses."""

import itertools
from collections.abc import Sequence
from pathlib import Path

from data_pipeline.records.shards import read_manifest
from data_pipeline.sources.base import DEFAULTS, IMAGE_SUFFIXES, REASONS, Options, Reader
from data_pipeline.sources.folder import METADATA, count_unread, read_folder, read_json_lines
from data_pipeline.sources.parquet import read_parquet
from data_pipeline.sources.records import PATTERNS, read_records
from data_pipeline.sources.tfds import SCHEME, read_tfds
from data_pipeline.sources.webdataset import read_tar

__all__ = ["DEFAULTS", "LOOKED_FOR", "REASONS", "TABLES", "Options", "Reader", "open_source", "source_names"]

LOOKED_FOR = (
    f"a {METADATA}, images ({', '.join(IMAGE_SUFFIXES)}) with a .txt or .json of the same name, .tar or .parquet "
    f"files, records that were made before, or {SCHEME}NAME[/CONFIG][:VERSION]"
)
TABLES: tuple[Reader, ...] = (read_parquet, read_tfds)  # what has columns
_FILES: dict[str, Reader] = {".tar": read_tar, ".parquet": read_parquet, ".jsonl": read_json_lines}


def open_source(src: Path | str) -> list[tuple[Reader, Path]]:
    """What to read, in order: a folder of images, of .tar or .parquet files, or of records, such a file, .jsonl, tfds:.

    Raises:
      ValueError: if there is nothing of the kind, several kinds in one folder, or the records are not complete.
    """
    if str(src).startswith(SCHEME):
        return [(read_tfds, Path(str(src).removeprefix(SCHEME)))]
    path = Path(src)
    if path.is_file() and path.suffix in _FILES:
        return [(_FILES[path.suffix], path)]
    if not path.is_dir():
        raise ValueError(f"{src} is not a folder and not a {', '.join(_FILES)} file")
    if any(next(path.glob(pattern), None) for pattern in PATTERNS):
        read_manifest(path)  # before anything is written
        return [(read_records, path)]
    kinds = [pattern for pattern in (METADATA, "*.tar", "*.parquet") if next(path.glob(pattern), None)]
    if len(kinds) > 1:
        choices = " or ".join(f"{path}/{kind}" for kind in kinds)
        raise ValueError(f"{path} holds {' and '.join(kinds)}, which may be the same samples twice; name {choices}")
    if not kinds or kinds == [METADATA]:
        return [(read_folder, path)]
    found = sorted(path.glob(kinds[0]))
    return [(count_unread, path), *((_FILES[file.suffix], file) for file in found)]


def source_names(sources: Sequence[Path | str]) -> list[str]:
    """A name for each of several sources: that of its file or folder, with a number where an earlier one has it."""
    names: list[str] = []
    for source in sources:
        path = Path(str(source).removeprefix(SCHEME)).absolute()
        name = (path.stem if path.is_file() else path.name).encode(errors="replace").decode()
        numbered = (f"{name}-{number}" for number in itertools.count(2))
        names.append(next(choice for choice in itertools.chain([name], numbered) if choice not in names))
    return names
