"""Sources of records, one module per kind. Every reader counts the samples that it refuses."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.records.schema import Record
from data_pipeline.records.shards import read_manifest
from data_pipeline.sources.base import (
    CAPTION_SUFFIXES,
    DEFAULTS,
    IMAGE_SUFFIXES,
    LOST,
    REASONS,
    Ledger,
    Options,
    Reader,
)
from data_pipeline.sources.folder import open_folder, open_metadata
from data_pipeline.sources.metadata import SUFFIXES
from data_pipeline.sources.parquet import read_parquet
from data_pipeline.sources.records import PATTERNS, read_records
from data_pipeline.sources.tfds import SCHEME, read_tfds
from data_pipeline.sources.tree import METADATA_NAMES
from data_pipeline.sources.webdataset import read_tar

__all__ = ["DEFAULTS", "LOOKED_FOR", "LOST", "REASONS", "Ledger", "Options", "Source", "open_source", "source_names"]

LOOKED_FOR = (
    f"a {', '.join(METADATA_NAMES[:-1])} or {METADATA_NAMES[-1]}, images ({', '.join(IMAGE_SUFFIXES)}) with a "
    f"{', '.join(CAPTION_SUFFIXES)} or .json of the same name, .tar or .parquet files, a folder of records, or "
    f"{SCHEME}NAME[/CONFIG][:VERSION]"
)
_FILES: dict[str, Reader] = {".tar": read_tar, ".parquet": read_parquet}


@dataclass(frozen=True)
class Source:
    """A source whose files have been listed.

    Attributes:
      records: records in order, read lazily.
      has_columns: whether `Options.columns` applies to this source.
    """

    records: Iterator[Record]
    has_columns: bool


def open_source(src: Path | str, options: Options, ledger: Ledger) -> Source:
    """Opens a source.

    Args:
      src: folder of images, metadata, tars and tables at any depth; one such file; folder of records; or `tfds:NAME`.
      options: options of reading.
      ledger: counts of files and samples.

    Raises:
      ValueError: if the source does not exist, its metadata cannot be used, or the folder of records is incomplete.
    """
    if str(src).startswith(SCHEME):
        return Source(read_tfds(Path(str(src).removeprefix(SCHEME)), options, ledger), True)
    path = Path(src)
    suffix = path.suffix.lower()
    if path.is_file() and suffix in _FILES:
        return Source(_FILES[suffix](path, options, ledger), suffix == ".parquet")
    if path.is_file() and suffix in SUFFIXES:
        return Source(open_metadata(path, options, ledger).read(options, ledger), True)
    if not path.is_dir():
        raise ValueError(f"{src} is neither a folder nor a {', '.join((*_FILES, *SUFFIXES))} file")
    if any(next(path.glob(pattern), None) for pattern in PATTERNS):
        read_manifest(path)  # an incomplete folder raises an error here, before anything is written
        return Source(read_records(path, options, ledger), False)
    folder = open_folder(path, options, ledger)
    return Source(folder.read(options, ledger), folder.has_columns)


def source_names(sources: Sequence[Path | str]) -> list[str]:
    """The name of each source's file or folder, followed by a number if an earlier source has the same name."""
    names: list[str] = []
    for source in sources:
        path = Path(str(source).removeprefix(SCHEME)).absolute()
        name = (path.stem if path.is_file() else path.name).encode(errors="replace").decode()
        numbered = (f"{name}-{number}" for number in itertools.count(2))
        names.append(next(choice for choice in itertools.chain([name], numbered) if choice not in names))
    return names
