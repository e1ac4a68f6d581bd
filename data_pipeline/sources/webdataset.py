"""WebDataset: tar files in which the members of one sample stand together and share their name up to the first dot.

shard/000.jpg  shard/000.txt  shard/000.json               an image and its caption, or the keys of `base.describe`
7.png  7.condition_0.png  7.condition_1.png  7.instruction.txt   an edit: result, sources in order, instruction
"""

import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from data_pipeline.funnel import Tally
from data_pipeline.records.schema import INSTRUCTION, MAX_CAPTION_CHARS, MAX_CONDITIONS, Record
from data_pipeline.sources import base
from data_pipeline.sources.base import IMAGE_SUFFIXES, MAX_JSON_BYTES, Options, Refused

_HEADERS = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)
_CONDITION = "condition_"
_MAX_MEMBERS = 32  # of one sample


class _Member(tarfile.TarInfo):
    """A member whose extended headers, which are read into memory, are of bounded size."""

    def _proc_member(self, tar):
        if self.type in _HEADERS and self.size > MAX_JSON_BYTES:
            raise tarfile.ReadError(f"an extended header of {self.size} bytes")
        return super()._proc_member(tar)  # type: ignore[misc]


def read_tar(path: Path, options: Options, refused: Tally, bar: tqdm) -> Iterator[Record]:
    """Records of one tar file, in its order; a damaged end costs what lies behind the damage."""
    done: set[str] = set()
    sample: dict[str, bytes | Refused] = {}
    current = ""

    def finish() -> Iterator[Record]:
        if current:
            bar.update()
            key = f"{path.stem}/{current}"
            try:
                if current in done:
                    raise Refused("duplicate_key")
                done.add(current)
                yield _record(key, sample, options, path)
            except Refused as error:
                refused.add(str(error), key)

    try:
        with tarfile.open(path, "r:", tarinfo=_Member) as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # the library would remember every member
                if member.isdir():
                    continue
                try:
                    name = base.inner_path(member.name)
                except Refused as error:
                    refused.add(str(error), f"{path.name}:{member.name[:80]!r}")
                    continue
                folder, _, file = name.rpartition("/")
                stem, _, suffix = file.partition(".")
                if file.startswith("._"):
                    continue  # macOS puts one before every file, for what its own file system stores beside it
                if not stem:
                    if file.lower().endswith(IMAGE_SUFFIXES):
                        refused.add("bad_name", f"{path.stem}/{name}")
                    continue
                key = f"{folder}/{stem}" if folder else stem
                if key != current or suffix.lower() in sample:  # the latter: a second sample of this name
                    yield from finish()
                    sample, current = {}, key
                if len(sample) < _MAX_MEMBERS:
                    sample[suffix.lower()] = _content(tar, member, suffix.lower(), options.max_image_bytes)
            _check_end(tar)
    except (tarfile.TarError, OSError, EOFError, ValueError, OverflowError) as error:
        refused.add("broken_file", f"{path.name}: {error}")
    yield from finish()


def _check_end(tar: tarfile.TarFile) -> None:
    """The library takes a damaged header, and a file that ends early, for the end of the archive."""
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    block = tar.fileobj.read(tarfile.BLOCKSIZE)
    if block != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError(f"a damaged header at byte {tar.offset}" if block else "it has no end")


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo, suffix: str, max_image_bytes: int) -> bytes | Refused:
    """The bytes of a member, or why they are not there; unknown kinds of members are not read."""
    limits = {"txt": 4 * MAX_CAPTION_CHARS, "json": MAX_JSON_BYTES}
    last = suffix.rpartition(".")[2]
    if f".{last}" not in IMAGE_SUFFIXES and last not in limits:
        return b""
    if not member.isreg():
        return Refused("not_a_file")
    if member.size > limits.get(last, max_image_bytes):
        return Refused({"txt": "caption_too_long", "json": "bad_json"}.get(last, "too_large"))
    file = tar.extractfile(member)
    data = b"" if file is None else file.read()
    if len(data) != member.size:
        raise tarfile.ReadError(f"{member.name[:80]!r} is cut off")
    return data


def _record(key: str, sample: dict[str, bytes | Refused], options: Options, path: Path) -> Record:
    for content in sample.values():
        if isinstance(content, Refused):
            raise content
    parts = {suffix: content for suffix, content in sample.items() if isinstance(content, bytes)}
    images = {suffix: content for suffix, content in parts.items() if f".{suffix.rpartition('.')[2]}" in IMAGE_SUFFIXES}
    targets = [content for suffix, content in images.items() if "." not in suffix]
    if len(targets) != 1:
        raise Refused("missing_image" if not targets else "bad_metadata")
    numbered = {
        PurePosixPath(suffix).stem.removeprefix(_CONDITION): content
        for suffix, content in images.items()
        if suffix.startswith(_CONDITION)
    }
    if len(numbered) > MAX_CONDITIONS:
        raise Refused("bad_metadata")
    if numbered.keys() != {str(index) for index in range(len(numbered))}:
        raise Refused("missing_condition")
    texts = []
    if "instruction.txt" in parts:
        texts.append(base.caption_of_file(parts["instruction.txt"], INSTRUCTION))
    if "txt" in parts:
        texts.append(base.caption_of_file(parts["txt"]))
    fields = base.parse_json(parts["json"]) if "json" in parts else {}
    described = base.describe({**fields, "conditions": []}, options.licence, texts=tuple(texts))
    conditions = tuple(numbered[str(index)] for index in range(len(numbered)))
    if not base.is_name(key):
        raise Refused("bad_name")
    return base.record(key, targets[0], conditions, described, options.source or path.stem)
