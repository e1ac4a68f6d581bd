"""WebDataset: tar files in which the members of one sample follow each other and share their name up to the first dot.

shard/000.jpg  shard/000.txt  shard/000.json    an image, its caption, and the keys of `fields.describe`
7.png  7.condition_0.png  7.condition_1.png  7.instruction.txt    an edit: target, condition images, instruction
"""

import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath

from data_pipeline.records.schema import INSTRUCTION, MAX_CONDITIONS, Record
from data_pipeline.sources import base
from data_pipeline.sources.base import CAPTION_SUFFIXES, IMAGE_SUFFIXES, UNREAD_IMAGE_SUFFIXES, Ledger, Options, Refused
from data_pipeline.sources.fields import MAX_JSON_BYTES, Description, make_record, read_caption_file, source_name
from data_pipeline.sources.sidecars import describe_sidecars

_HEADERS = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, Zstandard
_CONDITION = "condition_"
_MAX_MEMBERS = 32  # members of one sample
_Sample = dict[str, bytes | Refused]


class _Member(tarfile.TarInfo):
    """A member with a size limit on extended headers, which the library reads into memory."""

    def _proc_member(self, tar: tarfile.TarFile) -> tarfile.TarInfo:
        if self.type in _HEADERS and self.size > MAX_JSON_BYTES:
            raise tarfile.ReadError(f"an extended header of {self.size} bytes")
        return super()._proc_member(tar)  # type: ignore[misc]


def read_tar(path: Path, options: Options, ledger: Ledger, prefix: str | None = None) -> Iterator[Record]:
    """Records of one tar file, in order; samples after a damaged place are lost.

    Args:
      path: path of the file.
      options: options of reading.
      ledger: counts of the source.
      prefix: prefix of all keys; None means the name of the file.
    """
    if prefix is None:
        ledger.count_file(".tar")
        prefix = path.stem
    done: set[str] = set()
    samples = _samples(path, options, ledger, prefix)
    for name, sample in samples:
        ledger.bar.update()
        key = f"{prefix}/{name}"
        try:
            if name in done:
                raise Refused("duplicate_key")
            done.add(name)
            record, described = _record(key, sample, options, path, ledger)
            ledger.count_lost(described.lost, key)
            yield record
        except Refused as error:
            ledger.refuse(error, key)


def _samples(path: Path, options: Options, ledger: Ledger, prefix: str) -> Iterator[tuple[str, _Sample]]:
    """Yields the names of samples, each with its members by suffix."""
    sample: _Sample = {}
    current = ""
    try:
        with open(path, "rb") as file:
            if file.read(6).startswith(_COMPRESSED):
                ledger.refuse(Refused("not_read", "it is compressed; decompress it first"), path.name)
                return
        with tarfile.open(path, "r:", tarinfo=_Member) as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # otherwise the library keeps every member
                if (place := _place(member, path, ledger, prefix)) is None:
                    continue
                key, suffix = place
                if key != current or suffix in sample:  # a repeated suffix begins a second sample of this name
                    if current:
                        yield current, sample
                    sample, current = {}, key
                if len(sample) < _MAX_MEMBERS:
                    sample[suffix] = _content(tar, member, suffix, options.max_image_bytes)
            _check_end(tar)
    except (tarfile.TarError, OSError, EOFError, ValueError, OverflowError) as error:
        ledger.refuse("broken_file", f"{path.name}: {error}")
    if current:
        yield current, sample


def _place(member: tarfile.TarInfo, path: Path, ledger: Ledger, prefix: str) -> tuple[str, str] | None:
    """The name of a member's sample, and the member's suffix; None if it belongs to no sample."""
    if member.isdir():
        return None
    try:
        name = base.inner_path(member.name)
    except Refused as error:
        ledger.refuse(error, f"{path.name}:{member.name[:80]!r}")
        return None
    folder, _, file = name.rpartition("/")
    stem, _, suffix = file.partition(".")
    if file.startswith("._"):
        return None  # macOS adds such a file for every file, with attributes of its file system
    ledger.count_file(base.suffix_of(file))
    if not stem:
        if file.lower().endswith(IMAGE_SUFFIXES):
            ledger.refuse("bad_name", f"{prefix}/{name}")
        return None
    return f"{folder}/{stem}" if folder else stem, suffix.lower()


def _check_end(tar: tarfile.TarFile) -> None:
    """Raises an error if the archive is damaged or cut off; the library takes either for its end."""
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    block = tar.fileobj.read(tarfile.BLOCKSIZE)
    if block != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError(f"a damaged header at byte {tar.offset}" if block else "the file is cut off")


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo, suffix: str, max_image_bytes: int) -> bytes | Refused:
    """The bytes of a member, or why it cannot be used; members of unknown kinds are not read."""
    last = f".{suffix.rpartition('.')[2]}"
    if last in UNREAD_IMAGE_SUFFIXES:
        return Refused("not_read")
    limit, too_large = max_image_bytes, "too_large"
    if last in CAPTION_SUFFIXES:
        limit, too_large = base.MAX_TEXT_FILE_BYTES, "caption_too_long"
    elif last == ".json":
        limit, too_large = MAX_JSON_BYTES, "bad_json"
    elif last not in IMAGE_SUFFIXES:
        return b""
    if not member.isreg():
        return Refused("not_a_file")
    if member.size > limit:
        return Refused(too_large)
    file = tar.extractfile(member)
    data = b"" if file is None else file.read()
    if len(data) != member.size:
        raise tarfile.ReadError(f"{member.name[:80]!r} is cut off")
    return data


def _record(key: str, sample: _Sample, options: Options, path: Path, ledger: Ledger) -> tuple[Record, Description]:
    images: dict[str, bytes | Refused] = {}
    texts = []
    for suffix, content in sample.items():
        last = f".{suffix.rpartition('.')[2]}"
        if last in (*IMAGE_SUFFIXES, *UNREAD_IMAGE_SUFFIXES):
            images[suffix] = content
        elif f".{suffix}" in CAPTION_SUFFIXES:
            texts.append(read_caption_file(content))
        elif suffix.startswith("instruction.") and last in CAPTION_SUFFIXES:
            texts.insert(0, read_caption_file(content, INSTRUCTION))
    target, conditions = _images(images, options)
    described = describe_sidecars(sample.get("json"), texts, options, ledger)
    if described.conditions:  # the conditions of a tar are its members
        described = replace(described, conditions=())
    if not base.is_name(key):
        raise Refused("bad_name")
    return make_record(key, target, conditions, described, source_name(options, path.stem)), described


def _images(images: dict[str, bytes | Refused], options: Options) -> tuple[bytes, tuple[bytes, ...]]:
    """The target, which has no second suffix, and the numbered condition images."""
    read = {}
    for suffix, content in images.items():
        if isinstance(content, Refused):
            raise content
        read[suffix] = base.check_image(content, options.max_image_bytes)
    targets = [content for suffix, content in read.items() if "." not in suffix]
    if not targets and not any(suffix.startswith(_CONDITION) for suffix in read) and read:
        raise Refused("missing_image", "WebDataset splits names at their first dot; rename the members of this sample")
    if len(targets) != 1:
        raise Refused("missing_image" if not targets else "bad_metadata")
    numbered = {
        PurePosixPath(suffix).stem.removeprefix(_CONDITION): content
        for suffix, content in read.items()
        if suffix.startswith(_CONDITION)
    }
    if len(numbered) > MAX_CONDITIONS:
        raise Refused("bad_metadata")
    if numbered.keys() != {str(index) for index in range(len(numbered))}:
        raise Refused("missing_condition")
    return targets[0], tuple(numbered[str(index)] for index in range(len(numbered)))
