"""Encoding: selected records become a cache of samples, once, unit by unit.

A unit is a run of record shards of a size that the cache remembers, so what it holds depends on the records and the
selection alone: a killed run goes on where it stopped, and several processes share the units of one cache.
"""

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float, UInt8
from tqdm import tqdm

from data_pipeline.buckets import Bucket, Resolutions
from data_pipeline.decoding.images import decode_image
from data_pipeline.funnel import Step, Table, Tally, table
from data_pipeline.records.shards import RecordFolder, digest_of
from data_pipeline.samples import cache
from data_pipeline.samples.cache import Cache
from data_pipeline.samples.held_out import check_held_out, is_held
from data_pipeline.samples.prepare import prepare_image
from data_pipeline.samples.schema import NOTHING, TEXT_AND_IMAGES, Sample, Text
from data_pipeline.selection.index import Kept, read_selection

PREPROCESSING = 1  # raised whenever the same record would become other pixels or another prompt
AHEAD = 2  # batches that are decoded while one is encoded
DECODERS = 4  # threads; decoding and resizing leave Python's lock


class Encoders(Protocol):
    """What turns pixels and prompts into numbers; see `qi2_jax.inference.encoders`."""

    channels: int
    online: str  # see `samples.ONLINE`: what is only measured here, and kept as prompts and pictures

    def images_at_once(self, width: int, height: int) -> int: ...

    def latents(self, images: Sequence[UInt8[np.ndarray, "_ _ c"]]) -> list[Float[np.ndarray, "_ _ C"]]: ...

    def texts(
        self, texts: Sequence[str], images: Sequence[Sequence[UInt8[np.ndarray, "H W c"]]], max_patches: int = 0
    ) -> list[Text]: ...


@dataclass(frozen=True)
class EncodeReport:
    """What a cache holds: samples of every stream, how many records were left out for which reason, what training has
    to compute itself (see `samples.ONLINE`), and the size of its files."""

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
    """What a config's `data` group says of the pixels of samples and of which are held; a trainer refuses samples made
    with another.

    Raises:
      ValueError: for a fraction that cannot be held out.
    """
    check_held_out(data.held_out)
    keys = ("sides", "ratios", "max_upscale", "max_cropped", "smaller_too")
    values = {key: getattr(data, key) for key in keys}
    found = {key: list(value) if isinstance(value, (tuple, list)) else value for key, value in values.items()}
    if data.held_out:  # without it a cache is what it was before there was the key
        found["held_out"] = data.held_out
    return {"preprocessing": {"version": PREPROCESSING, **found}}


def fingerprint(records: RecordFolder, index: Path, data: Any, encoders: dict[str, Any]) -> dict[str, Any]:
    """What samples depend on: both encoders, the pixels, the selection with its captions, and the preprocessing.

    Args:
      encoders: what identifies them and how they compute.
    """
    selection = hashlib.sha256()
    for kept in read_selection(index):
        selection.update(repr((kept.index, kept.captions)).encode())
    return {
        **encoders,
        **preprocessing(data),
        "records": digest_of(records.shards),
        "selection": selection.hexdigest(),
    }


@dataclass(frozen=True)
class _Item:
    """A kept record on its way into one area."""

    kept: Kept
    side: int
    bucket: Bucket


@dataclass(frozen=True)
class _Pixels:
    """The same with its pictures, prepared; `held`: for validation; `left_out`: why it cannot be used after all."""

    item: _Item
    target: UInt8[np.ndarray, "H W c"] | None
    conditions: tuple[UInt8[np.ndarray, "H W c"], ...]
    texts: tuple[str, ...]
    held: bool
    left_out: str | None = None


def encode(
    folder: Path | str,
    index: Path,
    resolutions: Resolutions,
    encoders: Encoders,
    out: Path,
    made_from: dict[str, Any],
    *,
    records_per_unit: int,
    held_out: float = 0.0,
    process: tuple[int, int] = (0, 1),
    progress: bool = True,
) -> EncodeReport | None:
    """Writes the cache of a selection; what an earlier, interrupted call finished is not done again.

    Args:
      folder: of records.
      index: the selection, as `selection.write_selection` writes it.
      resolutions: areas and buckets.
      out: the cache.
      made_from: see `fingerprint`.
      records_per_unit: at least so many records make a unit.
      held_out: fraction of pictures whose samples go into streams of their own, see `held`.
      process: which of how many processes this one is; each does its share of the units.

    Returns:
      None while other processes still have units to write.

    Raises:
      ValueError: if the cache was made from something else, or nothing is left.
    """
    records = RecordFolder(folder)
    if next(read_selection(index), None) is None:
        raise ValueError(f"{index} selects no record; loosen data.thresholds and select again")
    units = _units(records, records_per_unit)
    cache.begin(out, made_from)
    mine = {number for number in range(process[0], len(units), process[1]) if not cache.has_unit(out, number)}
    total = sum(len(units[number]) for number in mine)
    with tqdm(total=total, desc="encode", unit="record", disable=not progress or not mine, dynamic_ncols=True) as bar:
        kept = read_selection(index)
        for number, own in _by_unit(kept, units):
            if number in mine:
                left_out = Tally()
                end = bar.n + len(units[number])
                size = len(units[number])
                samples = _encode_unit(records, own, resolutions, encoders, held_out, left_out, bar, size)
                cache.write_unit(out, number, samples, left_out)
                bar.update(end - bar.n)
    (empty,) = encoders.texts([""], [()])
    if not cache.finish(out, len(units), empty):
        return None
    return report(out, len(records))


def report(out: Path, records: int) -> EncodeReport:
    """What a complete cache holds."""
    made = Cache(out)
    streams = {str(stream.key): len(stream) for stream in made.streams}
    return EncodeReport(str(out), records, streams, made.left_out, made.online, made.nbytes)


def _units(records: RecordFolder, least: int) -> list[range]:
    """Ranges of record positions: consecutive shards, joined until they hold `least` records."""
    if least < 1:
        raise ValueError(f"records_per_unit is {least}; it must be at least 1")
    units, start, end = [], 0, 0
    for shard in records.shards:
        end += shard.records
        if end - start >= least:
            units.append(range(start, end))
            start = end
    return [*units, range(start, end)] if end > start else units


def _by_unit(kept: Iterable[Kept], units: Sequence[range]) -> Iterator[tuple[int, list[Kept]]]:
    """The kept records of every unit, also of those without any."""
    rows = iter(kept)
    ahead = next(rows, None)
    for number, unit in enumerate(units):
        own = []
        while ahead is not None and ahead.index < unit.stop:
            own.append(ahead)
            ahead = next(rows, None)
        yield number, own


def _encode_unit(
    records: RecordFolder,
    kept: Sequence[Kept],
    resolutions: Resolutions,
    encoders: Encoders,
    held_out: float,
    left_out: Tally,
    bar: tqdm,
    size: int,
) -> Iterator[tuple[int, Sample, bool]]:
    """Samples of a unit with their sides, and whether they are held; `bar` moves on by `size` records, evenly over the
    batches."""
    start = bar.n
    items = []
    for row in kept:
        fits = resolutions.fits(row.width, row.height)
        items += [_Item(row, side, fit.bucket) for side, fit in fits if fit.left_out is None]
        for _, fit in fits:
            if fit.left_out is not None:
                left_out.add(fit.left_out, row.key)
    # Batches have one shape of target and one number of conditions.
    items.sort(key=lambda item: (item.side, item.kept.conditions, str(item.bucket), item.kept.index))
    batches: list[list[_Item]] = []
    for _, group in itertools.groupby(items, key=lambda item: (item.side, item.kept.conditions, item.bucket)):
        alike = list(group)
        size = encoders.images_at_once(alike[0].bucket.width, alike[0].bucket.height)
        batches += [alike[i : i + size] for i in range(0, len(alike), size)]

    def prepare(batch: list[_Item]) -> list[_Pixels]:
        return [_prepare(records, item, resolutions, encoders.channels, held_out) for item in batch]

    for done, batch in enumerate(_ahead(prepare, batches)):
        bar.update(start + size * done // len(batches) - bar.n)
        for pixels in batch:
            if pixels.left_out is not None:
                left_out.add(pixels.left_out, pixels.item.kept.key)
        if whole := [pixels for pixels in batch if pixels.left_out is None]:
            yield from _encode_batch(whole, resolutions, encoders)


def _ahead(prepare, batches: Sequence[list[_Item]]) -> Iterator[list[_Pixels]]:
    """Prepared batches in order, some of them ahead of their use."""
    with ThreadPoolExecutor(DECODERS) as pool:
        futures = [pool.submit(prepare, batch) for batch in batches[:AHEAD]]
        for position in range(len(batches)):
            if position + AHEAD < len(batches):
                futures.append(pool.submit(prepare, batches[position + AHEAD]))
            yield futures[position].result()
            futures[position] = None  # type: ignore[call-overload]  # its pictures are not needed any more


def _prepare(records: RecordFolder, item: _Item, resolutions: Resolutions, channels: int, held_out: float) -> _Pixels:
    record = records[item.kept.index]
    assert record.key == item.kept.key, f"{item.kept.key} was selected, {record.key} stands in its place"
    texts = tuple(record.captions[position].text for position in item.kept.captions)
    held = is_held(record, held_out)
    target = prepare_image(decode_image(record.image).image, item.bucket, channels)
    conditions = []
    for data in record.conditions:
        image = decode_image(data).image
        fit = resolutions.buckets(item.side).fit(*image.size)
        if fit.left_out is not None:
            return _Pixels(item, None, (), texts, held, f"condition_{fit.left_out}")
        conditions.append(prepare_image(image, fit.bucket, channels))
    return _Pixels(item, target, tuple(conditions), texts, held)


def _encode_batch(
    batch: Sequence[_Pixels], resolutions: Resolutions, encoders: Encoders
) -> Iterator[tuple[int, Sample, bool]]:
    side, count = batch[0].item.side, len(batch[0].conditions)
    pictures: list[Any] = [picture for pixels in batch for picture in (pixels.target, *pixels.conditions)]
    latents = encoders.latents(pictures)
    asked = [(text, pixels.conditions) for pixels in batch for text in (*pixels.texts, *[""] * bool(count))]
    prompts, images = [text for text, _ in asked], [own for _, own in asked]
    texts = iter(encoders.texts(prompts, images, resolutions.buckets(side).max_tokens))
    for place, pixels in enumerate(batch):
        target, *conditions = latents[place * (count + 1) : (place + 1) * (count + 1)]
        own = tuple(itertools.islice(texts, len(pixels.texts)))
        empty = next(texts) if count else None
        read = pixels.conditions if encoders.online != NOTHING else ()
        drawn = pixels.target if encoders.online == TEXT_AND_IMAGES else None
        sample = Sample(target, own, tuple(conditions), empty, pixels.item.kept.index, read, drawn)
        yield side, sample, pixels.held
