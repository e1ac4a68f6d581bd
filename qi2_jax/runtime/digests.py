"""Digests of files, read in blocks."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
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


def of_weights(paths: Sequence[Path]) -> str:
    """The SHA-256 of one file, as `sha256sum` prints it; of several files, the hash of their digests as text.

    Runs record this value and caches record that of `of_files`, so neither may change.
    """
    digests = [of_file(path).hex() for path in paths]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
