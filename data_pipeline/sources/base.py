"""What all sources share: file suffixes, reasons for a refusal, options, and the ledger of a source."""

from collections import Counter
from collections.abc import Callable, Iterator
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
# Formats that people keep images and data sets in and that no reader here knows.
UNREAD_IMAGE_SUFFIXES = (
    *(".heic", ".heif", ".hif", ".jxl", ".jp2", ".j2k", ".jpx", ".jpf", ".psd", ".psb", ".svg", ".tga", ".ico"),
    *(".exr", ".hdr", ".ppm", ".pgm", ".pnm", ".qoi", ".dds", ".eps", ".pdf", ".xcf"),
    *(".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2"),
    *(".mp4", ".mov", ".webm", ".mkv", ".avi", ".m4v"),
)
UNREAD_SET_SUFFIXES = (
    *(".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".zip", ".7z", ".rar", ".gz", ".zst"),
    *(".arrow", ".feather", ".h5", ".hdf5", ".npz", ".npy", ".lmdb", ".mdb", ".tfrecord", ".arrayrecord", ".beton"),
    *(".jsonl", ".csv", ".tsv"),  # those that are called metadata are read
)
MAX_TEXT_FILE_BYTES = 4 * (MAX_CAPTION_CHARS + 1)  # of one caption: four bytes a character, and a byte-order mark
MAX_SUFFIXES = 100  # distinct suffixes that are counted by name
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"

REASONS = {
    "missing_file": "the metadata names a file that does not exist",
    "missing_image": "a sample without an image",
    "missing_caption": "a sample without a caption file, without a key for captions, or with blank captions alone",
    "missing_instruction": "condition images without an instruction",
    "missing_condition": "an instruction without condition images, or a gap in their numbers",
    "duplicate_key": "an earlier sample has the same name",
    "unknown_keys": "metadata or a table in which no known key names the image; --column image=NAME says which does",
    "not_listed": "an image that the metadata of its folder does not name",
    "not_read": "an image, archive or table in a format that is not read, such as .heic, .zip or .arrow",
    "hidden": "a hidden file, or a file in a hidden folder such as .thumbnails or .ipynb_checkpoints",
    "lfs_pointer": "a pointer of Git LFS instead of the image; `git lfs pull` fetches the image",
    "outside_folder": "a path, or the link behind it, that leaves the folder",
    "linked_folder": "a link to a folder; such links are not followed",
    "not_a_file": "a folder, link, pipe or device instead of a file",
    "unreadable": "a file that the operating system refused to read",
    "broken_file": "an archive or table that is damaged; the samples before the damage are kept",
    "bad_name": "a name that is blank, not UTF-8 or too long",
    "too_large": "an image file above the size limit",
    "caption_too_long": f"a caption above {MAX_CAPTION_CHARS} characters",
    "not_utf8": "text that is neither UTF-8 nor UTF-16 with a byte-order mark, or that contains U+0000",
    "bad_json": "metadata that is not a JSON object or is longer than a megabyte",
    "bad_metadata": "metadata with keys that contradict each other, or with values of the wrong type",
}
# Parts that a record can do without. The record is kept; the report counts the records that lost such a part.
LOST = {
    **{
        reason: f"{REASONS[reason]}, beside a caption that could be used"
        for reason in ("missing_caption", "caption_too_long", "not_utf8", "bad_json", "bad_metadata")
    },
    "too_many_captions": f"captions beyond the first {MAX_CAPTIONS}",
    "bad_language": "a language that is not a tag such as en or zh-Hans; the caption is kept without it",
    "unknown_kind": "a kind of caption that is not known; the caption is kept as a general one",
    "too_many_tags": f"tags beyond the first {MAX_TAGS}",
    "bad_tag": f"tags that are blank, not text, or longer than {MAX_TAG_CHARS} characters",
    "bad_licence": "a licence that is not text or is too long; the record is kept without a licence",
}


class Refused(Exception):
    """A sample, or a part of one, cannot be used.

    Attributes:
      reason: a key of REASONS.
      detail: what else helps the user, such as the keys that were there.
    """

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class Options:
    """How a source is read.

    Attributes:
      source: name of the data set in every record; None: the name of the file or folder.
      licence: licence of samples whose metadata gives none.
      max_image_bytes: larger image files are refused.
      columns: {field: column} for tables and metadata files; the fields are `layouts.FIELDS`.
      split: part of a tensorflow-datasets data set.
      data_dir: folder of all tensorflow-datasets data sets.
    """

    source: str | None = None
    licence: str | None = None
    max_image_bytes: int = MAX_IMAGE_BYTES
    columns: dict[str, str] = field(default_factory=dict)
    split: str = "train"
    data_dir: Path | None = None


DEFAULTS = Options()


@dataclass
class Ledger:
    """What became of the files and samples of one source.

    Attributes:
      bar: progress bar, which advances by one per sample.
      refused: samples that could not become records.
      lost: optional parts that records had to do without, see LOST.
      files: number of files (and members of archives) by lower-case suffix.
    """

    bar: tqdm
    refused: Tally = field(default_factory=Tally)
    lost: Tally = field(default_factory=Tally)
    files: Counter[str] = field(default_factory=Counter)

    def refuse(self, refusal: Refused | str, name: str) -> None:
        """Counts a refusal; `name` may hold bytes that are not UTF-8."""
        detail = "" if isinstance(refusal, str) else refusal.detail
        reason = refusal if isinstance(refusal, str) else refusal.reason
        printable = name.encode(errors="replace").decode()
        self.refused.add(reason, f"{printable} ({detail})" if detail else printable)

    def lose(self, reasons: tuple[str, ...], name: str) -> None:
        """Counts the parts that a record lost, once per record and reason."""
        for reason in dict.fromkeys(reasons):
            self.lost.add(reason, name)

    def meet(self, suffix: str) -> None:
        """Counts a file by its suffix; rare suffixes beyond a limit are counted together."""
        suffix = suffix.encode(errors="replace").decode() or "no suffix"
        self.files[suffix if suffix in self.files or len(self.files) < MAX_SUFFIXES else "others"] += 1


Reader = Callable[[Path, Options, Ledger], Iterator[Record]]


def suffix_of(name: str) -> str:
    """The suffix of a file name in lower case, such as `.jpg` or `.tar.gz`."""
    stem, dot, last = name.lower().rpartition(".")
    if not stem or not dot:
        return ""
    joined = f".{stem.rpartition('.')[2]}.{last}"
    return joined if joined in UNREAD_SET_SUFFIXES else f".{last}"


def is_name(name: object) -> bool:
    """Whether a value can name something: text that is not blank, UTF-8, of bounded length."""
    try:
        return (
            isinstance(name, str) and bool(name.strip()) and "\0" not in name and len(name.encode()) <= MAX_NAME_CHARS
        )
    except UnicodeEncodeError:
        return False


def inner_path(name: object) -> str:
    """A path inside a folder or archive, in one spelling for `a//b` and `./a/b`.

    Raises:
      Refused: if the path leaves the folder, or cannot be a name.
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
    """The bytes of an image file within the limit.

    Raises:
      Refused: if they are too many, or a pointer of Git LFS.
    """
    if len(data) > limit:
        raise Refused("too_large")
    if data.startswith(_LFS_POINTER):
        raise Refused("lfs_pointer")
    return data
