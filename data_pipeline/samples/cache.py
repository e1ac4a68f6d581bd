"""The cache of encoded samples: latents and text features, or the pixels and prompts that training computes them from.

    DIR/making.json                        fingerprint of everything that samples depend on; written first
    DIR/256-0/unit-00000.arrayrecord       samples with the area of 256 x 256 pixels, no condition image
    DIR/256-0/unit-00000.lengths           tokens of their texts, see `lengths`
    DIR/512-2/unit-00000.arrayrecord       edits at 512 with two condition images
    DIR/512-2-held/unit-00000.arrayrecord  such edits that are held out for validation, see `held_out`
    DIR/units/unit-00000.json              marks a complete unit; written after the files of the unit
    DIR/empty.safetensors                  features of the empty prompt, for classifier-free dropout
    DIR/manifest.json                      marks a complete cache; written last

A stream has one area and one number of condition images, so few compiled programs train and validate on it. A unit is
encoded and stored as a whole; after a kill, an incomplete unit is encoded again. For each file, a host keeps a name and
a count in memory, and an index while the file is open; for each text, its lengths.
"""

import concurrent.futures
import functools
import json
import logging
import re
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from data_pipeline.funnel import Tally
from data_pipeline.samples import lengths
from data_pipeline.samples.held_out import BY_IMAGES
from data_pipeline.samples.lengths import TextLengths
from data_pipeline.samples.schema import (
    NOTHING,
    TEXT,
    Sample,
    Text,
    decode_sample,
    decode_text,
    encode_sample,
    encode_text,
)
from qi2_jax.runtime.atomic import write_atomic, write_json_atomic

# Missing in schema 2: pixels of targets; in 3: held-out streams; in 4: prompts stored with text features.
SCHEMA, READABLE = 5, (2, 3, 4, 5)
MANIFEST, FINGERPRINT, EMPTY, UNITS = "manifest.json", "making.json", "empty.safetensors", "units"
HELD_OUT_BY = "held_out_by"  # key of the fingerprint; caches of earlier versions lack it
MAX_OPEN = 128  # open files of a stream; each takes 8 bytes per sample in memory
MEASURING_THREADS = 16  # that read samples whose text lengths are not stored
_WRITER_OPTIONS = "group_size:1,uncompressed"  # latents do not compress, and reading is five times as fast
_READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0,footer_prefetch_bytes:0"
_log = logging.getLogger(__name__)
_NAME = re.compile(r"unit-\d{5,}\.arrayrecord")


class StreamKey(NamedTuple):
    """Identifies a stream.

    Attributes:
      side: side in pixels of the square whose area the targets have.
      conditions: number of condition images.
      held: whether the samples are held out for validation.
    """

    side: int
    conditions: int
    held: bool = False

    def __str__(self) -> str:
        return f"{self.side}-{self.conditions}" + "-held" * self.held


@dataclass(frozen=True)
class Largest:
    """The largest token counts in a stream: of the target, of each text segment and of each condition image."""

    target: int
    text: tuple[int, ...]
    conditions: tuple[int, ...]

    @classmethod
    def of(cls, sample: Sample) -> "Largest":
        sizes = (latents.shape[0] * latents.shape[1] for latents in (sample.latents, *sample.conditions))
        text = np.max([text.lengths for text in sample.all_texts], axis=0)
        return cls(next(sizes), tuple(text.tolist()), tuple(sizes))

    def __or__(self, other: "Largest") -> "Largest":
        text, conditions = (
            tuple(map(max, *pair)) for pair in ((self.text, other.text), (self.conditions, other.conditions))
        )
        return Largest(max(self.target, other.target), text, conditions)


def begin(folder: Path, fingerprint: dict[str, Any]) -> None:
    """Writes the fingerprint of a new cache, or checks that an interrupted one has the same fingerprint.

    Raises:
      ValueError: if they differ; the message names the values.
    """
    path = folder / FINGERPRINT
    if path.is_file():
        check_fingerprint(folder, json.loads(path.read_bytes()), fingerprint)
    folder.mkdir(parents=True, exist_ok=True)
    write_json_atomic(path, fingerprint)


def check_fingerprint(folder: Path, recorded: dict[str, Any], expected: dict[str, Any]) -> None:
    """Raises a ValueError that names every value in which the recorded fingerprint differs from the expected one."""
    expected = json.loads(json.dumps(expected))
    differing = [
        f"{key}: {recorded.get(key)!r}, expected {value!r}"
        for key, value in expected.items()
        if recorded.get(key) != value
    ]
    if differing:
        raise ValueError(
            f"{folder} was encoded from other data or with other settings; revert the change, or encode into another "
            "folder. " + "; ".join(differing)
        )


def held_out_rule(folders: Iterable[Path]) -> str | None:
    """The rule by which the first begun cache among these folders holds out samples; None without such a cache.

    All caches of a curriculum must follow one rule. Otherwise a stage would train on what another one holds out.
    """
    for folder in folders:
        if (folder / FINGERPRINT).is_file():
            recorded = json.loads((folder / FINGERPRINT).read_bytes())
            if recorded.get("preprocessing", {}).get("held_out"):
                return recorded.get(HELD_OUT_BY, BY_IMAGES)
    return None


def has_unit(folder: Path, unit: int) -> bool:
    """Whether a unit is complete."""
    return (folder / UNITS / f"unit-{unit:05d}.json").is_file()


def write_unit(
    folder: Path, unit: int, samples: Iterable[tuple[int, Sample] | tuple[int, Sample, bool]], left_out: Tally
) -> None:
    """Writes the samples of a unit, and then its marker.

    Args:
      samples: tuples of the side, the sample and optionally whether it is held out (default: False).
      left_out: tally of the records that were left out; complete once `samples` is exhausted.
    """
    name = f"unit-{unit:05d}.arrayrecord"
    writers: dict[StreamKey, Any] = {}
    texts: dict[StreamKey, list[TextLengths]] = {}
    largest: dict[StreamKey, Largest] = {}
    try:
        for side, sample, *held in samples:
            key = StreamKey(side, len(sample.conditions), *held)
            if key not in writers:
                (folder / str(key)).mkdir(parents=True, exist_ok=True)
                writers[key] = ArrayRecordWriter(str(folder / str(key) / f"{name}.partial"), _WRITER_OPTIONS)
            writers[key].write(encode_sample(sample))
            texts.setdefault(key, []).append(TextLengths.of([sample]))
            largest[key] = largest[key] | Largest.of(sample) if key in largest else Largest.of(sample)
    finally:
        for writer in writers.values():
            writer.close()
    for key in writers:
        path = folder / str(key) / name
        lengths.write(path, TextLengths.join(texts[key]))
        path.with_name(f"{name}.partial").replace(path)
    streams = [{**key._asdict(), "samples": len(texts[key]), "largest": vars(largest[key])} for key in sorted(writers)]
    (folder / UNITS).mkdir(exist_ok=True)
    write_json_atomic(folder / UNITS / f"unit-{unit:05d}.json", {"streams": streams, "left_out": left_out.counts})


def finish(folder: Path, units: int, empty: Text) -> bool:
    """Completes a cache; returns False while units of other processes are missing.

    Args:
      units: number of units.
      empty: features of the empty prompt, which is " " in the published pipeline.

    Raises:
      ValueError: if there are no samples.
    """
    if not all(has_unit(folder, unit) for unit in range(units)):
        return False
    files: dict[StreamKey, list[dict]] = {}
    largest: dict[StreamKey, Largest] = {}
    left_out: dict[str, int] = {}
    for unit in range(units):
        marker = json.loads((folder / UNITS / f"unit-{unit:05d}.json").read_bytes())
        for part in marker["streams"]:
            key = _key(part)
            files.setdefault(key, []).append({"file": f"unit-{unit:05d}.arrayrecord", "samples": part["samples"]})
            in_unit = _largest(part["largest"])
            largest[key] = largest[key] | in_unit if key in largest else in_unit
        for reason, count in marker["left_out"].items():
            left_out[reason] = left_out.get(reason, 0) + count
    if not files:
        raise ValueError(f"there are no samples to write to {folder}; left out: {left_out or 'nothing'}")
    write_atomic(folder / EMPTY, encode_text(empty))
    streams = [{**key._asdict(), "largest": vars(largest[key]), "files": files[key]} for key in sorted(files)]
    fingerprint = json.loads((folder / FINGERPRINT).read_bytes())
    content = {"schema": SCHEMA, "fingerprint": fingerprint, "left_out": left_out, "streams": streams}
    write_json_atomic(folder / MANIFEST, content)
    return True


def _key(fields: dict) -> StreamKey:
    return StreamKey(fields["side"], fields["conditions"], fields.get("held", False))


def _largest(fields: dict) -> Largest:
    return Largest(int(fields["target"]), tuple(map(int, fields["text"])), tuple(map(int, fields["conditions"])))


class CachedStream(Sequence):
    """Samples of one area and one number of condition images, by index. Several threads may read it.

    Attributes:
      key: key of the stream.
      largest: largest token counts of its samples.
    """

    def __init__(self, folder: Path, key: StreamKey, largest: Largest, files: Sequence[tuple[str, int]]):
        self.folder, self.key, self.largest = folder, key, largest
        self._files = [name for name, _ in files]
        self._ends = np.cumsum([samples for _, samples in files], dtype=np.int64)
        self._open: OrderedDict[int, ArrayRecordReader] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def paths(self) -> list[Path]:
        """The files of the stream, in order."""
        return [self.folder / str(self.key) / name for name in self._files]

    def __getitem__(self, index: int) -> Sample:  # type: ignore[override]  # no slices
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)} in {self.folder / str(self.key)}")
        file = int(np.searchsorted(self._ends, index, side="right"))
        start = int(self._ends[file - 1]) if file else 0
        path = self.paths[file]
        try:
            return decode_sample(self._reader(file, path).read([index - start])[0])
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"{path}, sample {index - start}: {error}") from None

    @functools.cached_property
    def lengths(self) -> TextLengths:
        """The text lengths of all samples. Caches of earlier versions lack them: they are measured once and stored."""
        with concurrent.futures.ThreadPoolExecutor(MEASURING_THREADS, "lengths") as threads:
            return TextLengths.join(threads.map(self._lengths, range(len(self.paths)), self.paths))

    def _lengths(self, file: int, path: Path) -> TextLengths:
        stored = lengths.read(path)
        expected = int(self._ends[file] - (self._ends[file - 1] if file else 0))
        if stored is not None and len(stored.texts) != expected:
            raise ValueError(f"{path} has {expected} samples, but lengths of {len(stored.texts)}; delete the latter")
        return self._measure(file) if stored is None else stored

    def _measure(self, file: int) -> TextLengths:
        path, start = self.paths[file], int(self._ends[file - 1]) if file else 0
        _log.info("%s: measuring the texts of its samples, which an earlier version did not store", path)
        measured = TextLengths.of(self[index] for index in range(start, int(self._ends[file])))
        try:
            lengths.write(path, measured)
        except OSError as error:  # such as a folder that may only be read
            _log.warning("%s: the lengths of its texts cannot be stored, so every start measures them: %s", path, error)
        return measured

    def _reader(self, file: int, path: Path) -> ArrayRecordReader:
        with self._lock:
            if file in self._open:
                self._open.move_to_end(file)
            else:
                reader = ArrayRecordReader(str(path), _READER_OPTIONS)
                expected = int(self._ends[file] - (self._ends[file - 1] if file else 0))
                if reader.num_records() != expected:
                    raise ValueError(f"contains {reader.num_records()} samples, not {expected}")
                self._open[file] = reader
                if len(self._open) > MAX_OPEN:
                    self._open.popitem(last=False)
            return self._open[file]


class Cache:
    """A complete cache: its streams, in the order of their keys, and the empty prompt.

    Args:
      folder: folder that `qi2 data cache` wrote.
      fingerprint: values that the cache's fingerprint must have; None accepts any.

    Raises:
      ValueError: if the cache is incomplete, has another schema, or its fingerprint differs; the message names the
        values.
    """

    def __init__(self, folder: Path, fingerprint: dict[str, Any] | None = None):
        path = folder / MANIFEST
        if not path.is_file():
            raise ValueError(f"{folder} has no complete samples (no {MANIFEST}); run `qi2 data cache` first")
        try:
            manifest = json.loads(path.read_bytes())
            if manifest["schema"] not in READABLE:
                raise ValueError(f"it has schema {manifest['schema']!r}; this version reads {READABLE}")
            self.folder = folder
            self.fingerprint: dict[str, Any] = manifest["fingerprint"]
            self.left_out: dict[str, int] = manifest["left_out"]
            streams: list[dict] = manifest["streams"]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"{path} is not the manifest of encoded samples ({error}); name a folder of `qi2 data cache`, or "
                "a new one for `qi2 data cache`"
            ) from None
        if fingerprint is not None:
            check_fingerprint(folder, self.fingerprint, fingerprint)
        self.empty = decode_text((folder / EMPTY).read_bytes())
        self.streams = tuple(self._stream(fields) for fields in streams)

    def _stream(self, fields: dict) -> CachedStream:
        files = [(part["file"], int(part["samples"])) for part in fields["files"]]
        if not all(_NAME.fullmatch(name) and samples > 0 for name, samples in files):
            raise ValueError(
                f"{self.folder / MANIFEST} names files that are empty or not called unit-NNNNN.arrayrecord"
            )
        return CachedStream(self.folder, _key(fields), _largest(fields["largest"]), files)

    def __len__(self) -> int:
        return sum(map(len, self.streams))

    @property
    def held_out(self) -> float:
        """The fraction of images that are held out in separate streams, see the module `held_out`."""
        return self.fingerprint.get("preprocessing", {}).get("held_out", 0.0)

    @property
    def online(self) -> str:
        """What training computes instead of reading it here, see `schema.ONLINE`."""
        in_schema_2 = TEXT if self.fingerprint.get("text") == "online" else NOTHING
        return self.fingerprint.get("online", in_schema_2)

    @property
    def nbytes(self) -> int:
        """Total size of the files of all streams, in bytes."""
        return sum(path.stat().st_size for stream in self.streams for path in stream.paths)
