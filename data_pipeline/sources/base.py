"""Shared by all sources: file suffixes, reasons for a refusal, options, and the ledger of a source."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from data_pipeline.funnel import Tally
from data_pipeline.records.schema import (
    MAX_CAPTION_CHARS,
    MAX_CAPTIONS,
    MAX_IMAGE_BYTES,
    MAX_NAME_CHARS,
    MAX_TAG_CHARS,
    MAX_TAGS,
    Record,
)

IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff"),
)
CAPTION_SUFFIXES = (".txt", ".caption")
# Formats of images and data sets that no reader supports.
UNREAD_IMAGE_SUFFIXES = (
    *(".heic", ".heics", ".heif", ".heifs", ".hif", ".jxl", ".jxr", ".jp2", ".j2k", ".j2c", ".jpc", ".jpx", ".jpf"),
    *(".psd", ".psb", ".svg", ".tga", ".ico"),
    *(".exr", ".hdr", ".ppm", ".pgm", ".pnm", ".qoi", ".dds", ".eps", ".pdf", ".xcf"),
    *(".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2"),
    *(".mp4", ".mov", ".webm", ".mkv", ".avi", ".m4v"),
)
UNREAD_ARCHIVE_SUFFIXES = (
    *(".tar.gz", ".tgz", ".tar.bz2", ".tbz", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst", ".tar.lz4", ".tar.z"),
    *(".zip", ".zip.001", ".7z", ".7z.001", ".rar", ".gz", ".bz2", ".xz", ".zst", ".lz4"),
)
UNREAD_SET_SUFFIXES = (
    *UNREAD_ARCHIVE_SUFFIXES,
    *(".parq", ".pq", ".mds"),
    *(".arrow", ".feather", ".h5", ".hdf5", ".npz", ".npy", ".lmdb", ".mdb", ".tfrecord", ".arrayrecord", ".beton"),
    *(".jsonl", ".ndjson", ".csv", ".tsv"),  # files named metadata.* are read
)
MAX_TEXT_FILE_BYTES = 4 * (MAX_CAPTION_CHARS + 1)  # one caption: four bytes per character, and a byte-order mark
MAX_NAMES = 100  # distinct suffixes and keys that are counted separately
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"

REASONS = {
    "missing_file": "the metadata names a file that does not exist",
    "missing_image": "a sample without an image",
    "missing_caption": "a sample without a caption file or a key for captions, or with only blank captions",
    "missing_instruction": "condition images without an instruction",
    "missing_condition": "an instruction without condition images, or a gap in their numbers",
    "duplicate_key": "an earlier sample has the same name",
    "unknown_keys": "metadata or a table without a known key for the image; name it with --column image=NAME",
    "not_listed": "an image that the metadata of its folder does not list",
    "not_read": "an image, archive or table in an unsupported format, such as .heic, .zip or .arrow",
    "hidden": "a hidden file, or a file in a hidden folder such as .thumbnails or .ipynb_checkpoints",
    "lfs_pointer": "a pointer of Git LFS instead of the image; `git lfs pull` fetches the image",
    "outside_folder": "a path that leaves the folder, possibly through a link",
    "linked_folder": "a link to a folder; such links are not followed",
    "not_a_file": "a folder, link, pipe or device instead of a file",
    "unreadable": "a file that the operating system refused to read",
    "broken_file": "an archive or table that is damaged; the samples before the damage are kept",
    "broken_row": "a row of a CSV table with a quote that is not closed, or longer than a megabyte",
    "bad_name": "a name that is blank, not UTF-8 or too long",
    "too_large": "an image file above the size limit",
    "caption_too_long": f"a caption above {MAX_CAPTION_CHARS} characters",
    "not_utf8": "text that is neither UTF-8 nor UTF-16 or UTF-32 with a byte-order mark, or that contains U+0000",
    "bad_json": "metadata that is not a JSON object or is longer than a megabyte",
    "bad_metadata": "metadata with values of the wrong type",
}
# Optional parts of a record. The record is kept without the part, and the report counts such records.
LOST = {
    **{
        reason: f"{REASONS[reason]}; the record is kept with its other captions"
        for reason in ("missing_caption", "caption_too_long", "not_utf8", "bad_json", "bad_metadata")
    },
    "no_caption": "images without a usable caption, which are kept because of --without-captions",
    "too_many_captions": f"captions beyond the first {MAX_CAPTIONS}",
    "bad_language": "a language that is not a tag such as en or zh-Hans; the caption is kept without it",
    "unknown_kind": "an unknown kind of caption; the caption is kept as a general one",
    "too_many_tags": f"tags beyond the first {MAX_TAGS}",
    "bad_tag": f"tags that are blank, not text, or longer than {MAX_TAG_CHARS} characters",
    "bad_licence": "a licence that is not text or is too long; the record is kept without a licence",
}


class Refused(Exception):
    """A sample or a part of it that cannot be used.

    Attributes:
      reason: key of REASONS.
      detail: further help for the user, such as the keys that are present.
    """

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class Options:
    """Options of reading a source.

    Attributes:
      source: name of the data set in every record; None means the name of the file or folder.
      licence: licence for samples without one.
      max_image_bytes: size limit of image files; larger ones are refused.
      columns: {field: column} for tables and metadata files; fields are `layouts.FIELDS`.
      split: split of a tensorflow-datasets data set.
      data_dir: folder of all tensorflow-datasets data sets.
      without_captions: whether images without a usable caption become records, too; edits always need an instruction.
    """

    source: str | None = None
    licence: str | None = None
    max_image_bytes: int = MAX_IMAGE_BYTES
    columns: dict[str, str] = field(default_factory=dict)
    split: str = "train"
    data_dir: Path | None = None
    without_captions: bool = False


DEFAULTS = Options()


@dataclass
class Ledger:
    """Counts of the files and samples of one source.

    Attributes:
      bar: progress bar, which advances by one per sample.
      refused: samples that could not become records.
      lost: records that lost an optional part, see LOST.
      files: number of files (and members of archives) by lower-case suffix.
      unused: number of rows and JSON files that have a value under a key that no field reads, by key.
    """

    bar: tqdm
    refused: Tally = field(default_factory=Tally)
    lost: Tally = field(default_factory=Tally)
    files: Counter[str] = field(default_factory=Counter)
    unused: Counter[str] = field(default_factory=Counter)

    def refuse(self, refusal: Refused | str, name: str) -> None:
        """Counts a refusal; `name` may contain bytes that are not UTF-8."""
        detail = "" if isinstance(refusal, str) else refusal.detail
        reason = refusal if isinstance(refusal, str) else refusal.reason
        printable = name.encode(errors="replace").decode()
        self.refused.add(reason, f"{printable} ({detail})" if detail else printable)

    def count_lost(self, reasons: tuple[str, ...], name: str) -> None:
        """Counts the parts that a record lost, once per record and reason."""
        for reason in dict.fromkeys(reasons):
            self.lost.add(reason, name)

    def count_file(self, suffix: str) -> None:
        """Counts a file by its suffix; new suffixes beyond `MAX_NAMES` are counted together."""
        _count(self.files, suffix or "no suffix", 1)

    def count_unused(self, keys: Iterable[str], rows: int = 1) -> None:
        """Counts keys that no field reads; new keys beyond `MAX_NAMES` are counted together."""
        for key in keys:
            _count(self.unused, key, rows)


def _count(counts: Counter[str], name: str, count: int) -> None:
    name = name[:MAX_NAME_CHARS].encode(errors="replace").decode()
    counts[name if name in counts or len(counts) < MAX_NAMES else "others"] += count


Reader = Callable[[Path, Options, Ledger], Iterator[Record]]


def suffix_of(name: str) -> str:
    """The suffix of a file name in lower case, such as `.jpg` or `.tar.gz`."""
    stem, dot, last = name.lower().rpartition(".")
    if not stem or not dot:
        return ""
    joined = f".{stem.rpartition('.')[2]}.{last}"
    return joined if joined in UNREAD_SET_SUFFIXES else f".{last}"


def is_name(name: object) -> bool:
    """Whether a value is a valid name: text that is not blank, encodable as UTF-8 and of bounded length."""
    try:
        return (
            isinstance(name, str) and bool(name.strip()) and "\0" not in name and len(name.encode()) <= MAX_NAME_CHARS
        )
    except UnicodeEncodeError:
        return False


def inner_path(name: object) -> str:
    """A normalised path inside a folder or archive; `a//b` and `./a/b` become `a/b`.

    Raises:
      Refused: if the path leaves the folder or is not a valid name.
    """
    if not isinstance(name, str) or not name:
        raise Refused("bad_metadata")
    if name.startswith(("/", "\\")) or ".." in PurePosixPath(name.replace("\\", "/")).parts:
        raise Refused("outside_folder")
    key = str(PurePosixPath(name))
    if not is_name(key):
        raise Refused("bad_name")
    return key


def check_image(data: bytes, limit: int) -> bytes:
    """Returns the bytes of an image file if they are valid.

    Raises:
      Refused: if the file exceeds the limit or is a pointer of Git LFS.
    """
    if len(data) > limit:
        raise Refused("too_large")
    if data.startswith(_LFS_POINTER):
        raise Refused("lfs_pointer")
    return data
