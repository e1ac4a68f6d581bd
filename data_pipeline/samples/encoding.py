"""Encoding: selected records become a cache of samples, once, unit by unit.

A unit consists of consecutive record shards, so its content depends on the records and the selection alone. An
interrupted run resumes at the first missing unit, and several processes share the units of one cache.
"""

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_pipeline.buckets import Resolutions
from data_pipeline.funnel import Step, Table, Tally, table
from data_pipeline.records.shards import RecordFolder, digest_of
from data_pipeline.samples import cache
from data_pipeline.samples.cache import Cache
from data_pipeline.samples.held_out import BY_IMAGES, HoldOut, check_held_out
from data_pipeline.samples.items import Encoders, ItemPreparer, Pixels
from data_pipeline.samples.schema import NOTHING, TEXT_AND_IMAGES, Sample
from data_pipeline.selection.index import Kept, read_selection
from qi2_jax.runtime import lock
from qi2_jax.runtime.read_ahead import map_ahead

PREPROCESSING = 1  # raise it whenever the same record would give different pixels or a different prompt
AHEAD = 2  # batches that are decoded while another is encoded
DECODERS = 4  # threads; decoding and resizing release Python's lock


@dataclass(frozen=True)
class EncodeReport:
    """Content of a cache.

    Attributes:
      folder: folder of the cache.
      records: number of records in the folder that it was encoded from.
      streams: number of samples in every stream.
      left_out: number of records that were left out, by reason.
      online: features that training computes itself, see `schema.ONLINE`.
      bytes: total size of its files.
    """

    folder: str
    records: int
    streams: dict[str, int]
    left_out: dict[str, int]
    online: str
    bytes: int

    def table(self) -> Table:
        """A table with a row per stream."""
        left_out = Tally(dict(self.left_out), {reason: [] for reason in self.left_out})
        rows = [Step("records and their areas", sum(self.streams.values()) + left_out.total, left_out)]
        rows += [Step(f"stream {name}", count, Tally()) for name, count in self.streams.items()]
        size = self.bytes / max(1, sum(self.streams.values())) / 1000
        what = f"{size:,.0f} kB each; online: {self.online}"
        return table(f"samples in {self.folder} (stream: side-conditions, held for validation), {what}", tuple(rows))

    def to_dict(self) -> dict:
        return asdict(self)


def preprocessing(data: Any) -> dict[str, Any]:
    """The part of a config's `data` group that decides the pixels of samples and which of them are held out.

    A trainer refuses samples that were encoded with different values.

    Raises:
      ValueError: if `held_out` is not a valid fraction.
    """
    check_held_out(data.held_out)
    keys = ("sides", "ratios", "max_upscale", "max_cropped", "smaller_too")
    values = {key: getattr(data, key) for key in keys}
    plain = {key: list(value) if isinstance(value, (tuple, list)) else value for key, value in values.items()}
    if data.held_out:  # caches without held-out images stay compatible with those written before this key existed
        plain["held_out"] = data.held_out
    return {"preprocessing": {"version": PREPROCESSING, **plain}}


def fingerprint(
    records: RecordFolder, index: Path, data: Any, encoders: dict[str, Any], held_out_by: str = BY_IMAGES
) -> dict[str, Any]:
    """Everything that samples depend on: encoders, records, the selection with its captions, and preprocessing.

    Args:
      records: folder of the records.
      index: index of the selected records.
      data: group `data` of a config.
      encoders: values that identify the encoders and how they compute.
      held_out_by: rule by which records are held out, see `HoldOut.rule`.
    """
    selection = hashlib.sha256()
    for kept in read_selection(index):
        selection.update(repr((kept.index, kept.captions)).encode())
    return {
        **encoders,
        **preprocessing(data),
        "records": digest_of(records.shards),
        "selection": selection.hexdigest(),
        **({} if held_out_by == BY_IMAGES else {cache.HELD_OUT_BY: held_out_by}),  # as in caches without this key
    }


def encode(
    folder: Path | str,
    index: Path,
    resolutions: Resolutions,
    encoders: Encoders,
    out: Path,
    cache_fingerprint: dict[str, Any],
    *,
    records_per_unit: int,
    held_out: HoldOut | None = None,
    process: tuple[int, int] = (0, 1),
    progress: bool = True,
) -> EncodeReport | None:
    """Writes the cache of a selection; units that an interrupted call has finished are not encoded again.

    Args:
      folder: folder of the records.
      index: index of the selected records, as `selection.index.write_selection` writes it.
      resolutions: areas and buckets.
      encoders: encoders of images and prompts.
      out: folder of the cache.
      cache_fingerprint: result of `fingerprint`.
      records_per_unit: minimum number of records in a unit.
      held_out: rule that decides which samples go into separate streams; None: no sample does.
      process: index of this process and number of processes; each encodes its share of the units.

    Returns:
      None while other processes still have units to write.

    Raises:
      ValueError: if the cache has another fingerprint, another process writes to it, or no record is left.
    """
    records = RecordFolder(folder)
    if next(read_selection(index), None) is None:
        raise ValueError(f"{index} selects no record; loosen data.thresholds and select again")
    units = _units(records, records_per_unit)
    with lock.hold(out, remove=True):
        cache.begin(out, cache_fingerprint)
        missing = [number for number in range(process[0], len(units), process[1]) if not cache.has_unit(out, number)]
        preparer = ItemPreparer(records, resolutions, encoders, held_out or HoldOut(records, 0.0))
        _write_units(preparer, index, units, missing, out, progress)
        (empty,) = encoders.texts([""], [()])
        return report(out, len(records)) if cache.finish(out, len(units), empty) else None


def _write_units(
    preparer: ItemPreparer, index: Path, units: Sequence[range], missing: Sequence[int], out: Path, progress: bool
) -> None:
    total = sum(len(units[number]) for number in missing)
    hidden = not progress or not missing
    with tqdm(total=total, desc="encode", unit="record", disable=hidden, dynamic_ncols=True) as bar:
        for number, selected in _by_unit(read_selection(index), units):
            if number not in missing:
                continue
            left_out = Tally()
            end = bar.n + len(units[number])
            cache.write_unit(out, number, _encode_unit(preparer, selected, left_out, bar, len(units[number])), left_out)
            bar.update(end - bar.n)


def report(out: Path, records: int) -> EncodeReport:
    """The content of a complete cache."""
    finished = Cache(out)
    streams = {str(stream.key): len(stream) for stream in finished.streams}
    return EncodeReport(str(out), records, streams, finished.left_out, finished.online, finished.nbytes)


def _units(records: RecordFolder, records_per_unit: int) -> list[range]:
    """Ranges of record positions: consecutive shards are joined until they contain `records_per_unit` records."""
    if records_per_unit < 1:
        raise ValueError(f"records_per_unit is {records_per_unit}; it must be at least 1")
    units, start, end = [], 0, 0
    for shard in records.shards:
        end += shard.records
        if end - start >= records_per_unit:
            units.append(range(start, end))
            start = end
    return [*units, range(start, end)] if end > start else units


def _by_unit(kept: Iterable[Kept], units: Sequence[range]) -> Iterator[tuple[int, list[Kept]]]:
    """The selected records of every unit; some units may have none."""
    rows = iter(kept)
    row = next(rows, None)
    for number, unit in enumerate(units):
        selected = []
        while row is not None and row.index < unit.stop:
            selected.append(row)
            row = next(rows, None)
        yield number, selected


def _encode_unit(
    preparer: ItemPreparer, selected: Sequence[Kept], left_out: Tally, bar: tqdm, size: int
) -> Iterator[tuple[int, Sample, bool]]:
    """Samples of a unit with their sides, and whether they are held out.

    Args:
      preparer: preparer of the unit's images.
      selected: selected records of the unit.
      left_out: tally to which records that are left out are added.
      bar: progress bar, which advances by `size`, evenly over the batches.
      size: number of records in the unit.
    """
    start = bar.n
    batches = preparer.batches(selected, left_out)
    for done, batch in enumerate(map_ahead(preparer.prepare, batches, AHEAD + 1, DECODERS)):
        bar.update(start + size * done // len(batches) - bar.n)
        for pixels in batch:
            if pixels.left_out is not None:
                left_out.add(pixels.left_out, pixels.item.kept.key)
        if usable := [pixels for pixels in batch if pixels.left_out is None]:
            yield from _encode_batch(usable, preparer.resolutions, preparer.encoders)


def _encode_batch(
    batch: Sequence[Pixels], resolutions: Resolutions, encoders: Encoders
) -> Iterator[tuple[int, Sample, bool]]:
    side, count = batch[0].item.side, len(batch[0].conditions)
    images: list[Any] = [image for pixels in batch for image in (pixels.target, *pixels.conditions)]
    latents = encoders.latents(images)
    with_images = [(text, pixels.conditions) for pixels in batch for text in (*pixels.texts, *[""] * bool(count))]
    prompts, condition_images = [text for text, _ in with_images], [conditions for _, conditions in with_images]
    texts = iter(encoders.texts(prompts, condition_images, resolutions.buckets(side).max_tokens))
    for place, pixels in enumerate(batch):
        target, *conditions = latents[place * (count + 1) : (place + 1) * (count + 1)]
        encoded = tuple(itertools.islice(texts, len(pixels.texts)))
        empty = next(texts) if count else None
        kept_conditions = pixels.conditions if encoders.online != NOTHING else ()
        kept_target = pixels.target if encoders.online == TEXT_AND_IMAGES else None
        sample = Sample(target, encoded, tuple(conditions), empty, pixels.item.kept.index, kept_conditions, kept_target)
        yield side, sample, pixels.held
