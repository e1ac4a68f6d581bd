"""Where records come from: one file per kind of source, each a reader that counts what it refuses."""

from pathlib import Path

from data_pipeline.sources.base import DEFAULTS, IMAGE_SUFFIXES, REASONS, Options, Reader
from data_pipeline.sources.folder import METADATA, read_folder, read_json_lines
from data_pipeline.sources.parquet import read_parquet
from data_pipeline.sources.webdataset import read_tar

__all__ = ["DEFAULTS", "LOOKED_FOR", "REASONS", "Options", "Reader", "open_source"]

LOOKED_FOR = (
    f"a {METADATA}, images ({', '.join(IMAGE_SUFFIXES)}) with a .txt or .json of the same name, .tar or .parquet files"
)
_FILES: dict[str, Reader] = {".tar": read_tar, ".parquet": read_parquet, ".jsonl": read_json_lines}


def open_source(src: Path | str) -> list[tuple[Reader, Path]]:
    """What to read, in order: a folder of images, a .jsonl, .tar or .parquet file, or a folder of the latter two.

    Raises:
      ValueError: if there is nothing of the kind.
    """
    path = Path(src)
    if path.is_file() and path.suffix in _FILES:
        return [(_FILES[path.suffix], path)]
    if not path.is_dir():
        raise ValueError(f"{src} is not a folder and not a {', '.join(_FILES)} file")
    if not (path / METADATA).is_file():
        for suffix in (".tar", ".parquet"):
            if found := sorted(path.glob(f"*{suffix}")):
                return [(_FILES[suffix], file) for file in found]
    return [(read_folder, path)]
