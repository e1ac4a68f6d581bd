"""The files of a folder: each is counted by its suffix, and then either kept for a reader or refused."""

import os
import re
import stat
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from data_pipeline.sources.base import (
    CAPTION_SUFFIXES,
    IMAGE_SUFFIXES,
    UNREAD_ARCHIVE_SUFFIXES,
    UNREAD_IMAGE_SUFFIXES,
    UNREAD_SET_SUFFIXES,
    Ledger,
    Refused,
    suffix_of,
)
from data_pipeline.sources.fields import MAX_JSON_BYTES, parse_json

METADATA_NAMES = ("metadata.jsonl", "metadata.csv", "metadata.json")
ARCHIVE_SUFFIXES = (".tar", ".parquet")
PROMPT_FILE = "prompt.json"
_SOURCE = re.compile(r"(.+)_0(\.[^.]+)")
_SIDECAR_SUFFIXES = (".json", *CAPTION_SUFFIXES)
_KNOWN = frozenset((*IMAGE_SUFFIXES, *UNREAD_IMAGE_SUFFIXES, *UNREAD_SET_SUFFIXES, *ARCHIVE_SUFFIXES))
TABLE_SUFFIXES = (".jsonl", ".csv", ".json")  # of metadata files under other names, which are not read in a folder
EXTRACT = "extract it, or repack it as a plain .tar"
_HINTS = {
    **dict.fromkeys(UNREAD_ARCHIVE_SUFFIXES, EXTRACT),
    ".jsonl": "name it as the source if it lists images",
    ".csv": "name it as the source if it lists images",
    ".ndjson": "rename it to .jsonl if it lists images",
    ".parq": "rename it to .parquet",
    ".pq": "rename it to .parquet",
    ".arrayrecord": "name its folder as the source",
}
_IMAGE_STARTS = (b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF8", b"II*\0", b"MM\0*")
_HIDDEN = ("__MACOSX", "@eaDir")  # added by macOS and Synology; other hidden names begin with a dot


@dataclass(frozen=True)
class Image:
    """An image file and the sidecar files that describe it; all relative to the root.

    Attributes:
      key: path of the image.
      sidecars: paths of the sidecar files.
      source: for a pair of InstructPix2Pix, the image before the edit; the only sidecar file is then its prompt.
    """

    key: str
    sidecars: tuple[str, ...]
    source: str | None = None

    @property
    def has_json(self) -> bool:
        return any(suffix_of(name) == ".json" for name in self.sidecars)


@dataclass(frozen=True)
class Tree:
    """The files of a folder that have a reader.

    Attributes:
      root: real path of the folder.
      images: image files with their sidecar files.
      metadata: files named in METADATA_NAMES, relative to the root.
      archives: tars and tables, relative to the root.
      compressed: archives without a reader, relative to the root.
      tables: files with TABLE_SUFFIXES under other names than METADATA_NAMES, which may list images.
    """

    root: Path
    images: list[Image] = field(default_factory=list)
    metadata: list[str] = field(default_factory=list)
    archives: list[str] = field(default_factory=list)
    compressed: list[str] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)


def walk(folder: Path, ledger: Ledger) -> Tree:
    """Visits every file of a folder at any depth; files without a reader are counted in the ledger."""
    tree = Tree(folder.resolve())
    for parent, subfolders, names in os.walk(tree.root):
        place = "" if parent == str(tree.root) else f"{Path(parent).relative_to(tree.root).as_posix()}/"
        for name in subfolders:
            if os.path.islink(os.path.join(parent, name)):
                ledger.refuse("linked_folder", place + name)
        _sort_files(tree, place, names, ledger)
    for keys in (tree.metadata, tree.archives, tree.compressed, tree.tables):
        keys.sort()
    tree.images.sort(key=lambda image: image.key)
    return tree


def _sort_files(tree: Tree, place: str, names: list[str], ledger: Ledger) -> None:
    hidden_place = any(part.startswith(".") or part in _HIDDEN for part in place.split("/"))
    is_pairs = PROMPT_FILE in names and not hidden_place and _is_prompt(tree, place)
    by_stem: dict[str, list[str]] = {}
    images = []
    for name in names:
        suffix = suffix_of(name)
        known = suffix in _KNOWN
        if hidden_place or name.startswith("."):
            ledger.count_file("hidden")
            if known:
                ledger.refuse("hidden", place + name)
            continue
        ledger.count_file(suffix)
        if suffix in _SIDECAR_SUFFIXES:
            by_stem.setdefault(_stem(name), []).append(place + name)
        if name in METADATA_NAMES:
            if not is_pairs:  # in InstructPix2Pix this file has the seeds of the pairs
                tree.metadata.append(place + name)
        elif suffix in IMAGE_SUFFIXES:
            images.append(name)
        elif suffix in ARCHIVE_SUFFIXES:
            tree.archives.append(place + name)
        elif known:
            ledger.refuse(Refused("not_read", _HINTS.get(suffix, "")), place + name)
            if suffix in UNREAD_ARCHIVE_SUFFIXES:
                tree.compressed.append(place + name)
            elif suffix in TABLE_SUFFIXES:
                tree.tables.append(place + name)
        elif suffix not in _SIDECAR_SUFFIXES and _is_image(tree.root / place / name):
            ledger.refuse(
                Refused("not_read", "an image by its content; give it the suffix of its format"), place + name
            )
    sources = _pair_sources(set(images)) if is_pairs else {}
    for name in set(images) - set(sources.values()):
        if name in sources:
            tree.images.append(Image(place + name, (place + PROMPT_FILE,), place + sources[name]))
        else:  # some downloaders write `1.jpg.txt` and `1.jpg.json`
            sidecars = (*by_stem.get(_stem(name), ()), *by_stem.get(unicodedata.normalize("NFC", name), ()))
            tree.images.append(Image(place + name, tuple(sorted(sidecars, key=_by_suffix))))
    stems = {_stem(name) for name in images} | {unicodedata.normalize("NFC", name) for name in images}
    orphans = (key for stem, keys in by_stem.items() if stem not in stems and not is_pairs for key in keys)
    tree.tables.extend(key for key in orphans if suffix_of(key) in TABLE_SUFFIXES and key not in tree.metadata)


def _is_image(path: Path) -> bool:
    """Whether a file with an unknown suffix begins as an image does: JPEG, PNG, GIF, WebP, TIFF, AVIF or HEIC."""
    try:
        if not stat.S_ISREG(os.lstat(path).st_mode):
            return False
        with open(path, "rb") as file:
            start = file.read(12)
    except OSError:
        return False
    return start.startswith(_IMAGE_STARTS) or start[8:12] in (b"WEBP", b"avif", b"avis", b"heic", b"heix", b"mif1")


def _by_suffix(key: str) -> tuple[int, str]:
    """Sort key: `.txt` before `.TXT`, `.caption` and `.json`, whatever the order of the file system."""
    return (*CAPTION_SUFFIXES, ".json").index(suffix_of(key)), key.swapcase()


def _pair_sources(names: set[str]) -> dict[str, str]:
    """Returns {target: source} for the pairs `1_1.jpg` and `1_0.jpg` among file names."""
    matches = [match for match in map(_SOURCE.fullmatch, names) if match]
    return {target: match[0] for match in matches if (target := f"{match[1]}_1{match[2]}") in names}


def _is_prompt(tree: Tree, place: str) -> bool:
    """Whether the `prompt.json` of a folder describes an edit, as in InstructPix2Pix."""
    try:
        return "edit" in parse_json(Files(tree.root).read(place + PROMPT_FILE, MAX_JSON_BYTES, "bad_json"))
    except Refused:
        return False


def _stem(name: str) -> str:
    """The name without its suffix, composed: macOS decomposes `é` in names of files, other systems do not."""
    return unicodedata.normalize("NFC", name.rpartition(".")[0])


class Files:
    """Reads files of a folder; links are followed only if they stay inside it.

    Snapshots in the cache of the Hugging Face hub link to blobs of the same data set, which count as inside.
    """

    def __init__(self, root: Path):
        self.root = root
        self._inside = (root, *_hub_blobs(root))

    def path(self, key: str) -> Path:
        """The real path of a regular file. Raises Refused."""
        try:
            path = (self.root / key).resolve(strict=True)
            mode = path.stat().st_mode
        except FileNotFoundError:
            raise Refused("missing_file") from None
        except (OSError, RuntimeError):  # no permission, a loop of links
            raise Refused("unreadable") from None
        if not any(path.is_relative_to(folder) for folder in self._inside):
            raise Refused("outside_folder")
        if not stat.S_ISREG(mode):
            raise Refused("not_a_file")
        return path

    def read(self, key: str, limit: int, too_large: str) -> bytes:
        """The bytes of a file. Raises Refused; the reason is `too_large` for a file above `limit`."""
        path = self.path(key)
        try:
            with open(path, "rb") as file:
                data = file.read(limit + 1)  # the limit holds even for a file that grows
        except OSError:
            raise Refused("unreadable") from None
        if len(data) > limit:
            raise Refused(too_large)
        return data


def _hub_blobs(root: Path) -> Iterator[Path]:
    """The folder of blobs for a folder in a snapshot of the hub: `datasets--OWNER--NAME/snapshots/COMMIT/..`."""
    for folder in root.parents:
        blobs = folder.parent / "blobs"
        if folder.name == "snapshots" and "--" in folder.parent.name and not blobs.is_symlink():
            yield blobs
