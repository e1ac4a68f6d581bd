"""Digests of files, read in blocks."""

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any


def of_file(path: Path, algorithm: Callable[[], Any] = hashlib.sha256) -> bytes:
    """The digest of a file's bytes; `.hex()` is what `sha256sum` prints.

    Args:
      path: file to read.
      algorithm: constructor of a hashlib object.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, algorithm).digest()


def of_files(paths: Iterable[Path]) -> str:
    """One SHA-256 for several files: the digest of their digests, in the given order."""
    return hashlib.sha256(b"".join(map(of_file, paths))).hexdigest()
