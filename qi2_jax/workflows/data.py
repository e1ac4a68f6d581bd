"""From a folder of captioned images to the pictures that a job trains on, reporting what was left out and why."""

import dataclasses
import pathlib
from collections.abc import Iterable
from typing import Any

from rich.console import Console

from data_pipeline.buckets import Resolutions
from data_pipeline.demo.dataset import write_demo_folder
from data_pipeline.loading.crops import Picture, Pictures
from data_pipeline.records.shards import MANIFEST, RecordFolder
from data_pipeline.scoring import cascade
from data_pipeline.selection.index import INDEX, Kept, write_selection
from data_pipeline.selection.select import select
from data_pipeline.selection.thresholds import Thresholds
from data_pipeline.sources.ingest import ingest


@dataclasses.dataclass(frozen=True)
class Caption:
    """One sample to train on: a picture, one of its captions, and its size in pixels."""

    picture: int
    text: str
    width: int
    height: int


def prepare(config: Any, out: pathlib.Path, source: pathlib.Path | None, console: Console) -> Pictures:
    """Ingests, scores, selects and buckets; what is there from an earlier run is used again.

    Args:
      config: `sides`, `ratios`, `max_upscale`, `max_cropped`, `thresholds` (fields of `Thresholds`), `channels`,
        `workers` (0: one per core).
      out: receives `records/` with the selection's index, and `demo_set/` where there is no source.
      source: the user's folder; None: the embedded demo set.
      console: where the reports go.

    Raises:
      ValueError: if no image is left, or the source is no usable folder.
    """
    records = out / "records"
    if not (records / MANIFEST).is_file():
        if source is None:
            source = out / "demo_set"
            if not (source / "metadata.jsonl").is_file():
                write_demo_folder(source)
        console.print(ingest(source, records).table())
    else:
        console.print(f"{records} is there from an earlier run and used again; for other pictures choose another --out")
    cascade.score(records, workers=config.workers or None)
    selection = select(records, Thresholds(**config.thresholds))
    console.print(selection.table())
    if any(kept.conditions for kept in selection.kept):
        raise ValueError("a job trains text-to-image only: leave edits out with data.thresholds.edits=False")
    write_selection(records / INDEX, selection)
    resolutions = Resolutions.of_config(config)
    console.print(resolutions.report([(kept.width, kept.height) for kept in selection.kept]).table())
    chosen = pictures(records, selection.kept, resolutions, config.channels)
    if not len(chosen):
        raise ValueError(
            f"no image of {records} is left after selection and buckets: the tables above say why; loosen "
            "data.thresholds, data.max_upscale or data.max_cropped, or give more pictures in a new --out"
        )
    return chosen


def pictures(records: pathlib.Path, kept: Iterable[Kept], resolutions: Resolutions, channels: int) -> Pictures:
    """The pixels of selected records that fit a bucket, each in its largest."""
    fits = [(row, resolutions.fits(row.width, row.height)[0][1]) for row in kept]
    chosen = tuple(Picture(row.index, fit.bucket, row.captions) for row, fit in fits if fit.left_out is None)
    return Pictures(RecordFolder(records), chosen, channels)


def captions(pictures: Pictures) -> list[Caption]:
    """Every selected caption of every picture, in order."""
    return [
        Caption(index, caption.text, picture.bucket.width, picture.bucket.height)
        for index, picture in enumerate(pictures.chosen)
        for caption in pictures.captions(index)
    ]
