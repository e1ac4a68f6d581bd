"""From a folder of captioned images to the images that the demo trains on."""

import dataclasses
import logging
import pathlib
from collections.abc import Iterable

from data_pipeline.buckets import Resolutions
from data_pipeline.config import DataConfig
from data_pipeline.demo.dataset import write_demo_folder
from data_pipeline.loading.crops import SelectedImage, SelectedImages
from data_pipeline.records.shards import MANIFEST, RecordFolder
from data_pipeline.scoring import cascade
from data_pipeline.selection.index import INDEX, Kept, write_selection
from data_pipeline.selection.select import select
from data_pipeline.sources.ingest import ingest
from qi2_jax.workflows.reports import Show

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Caption:
    """A caption to train on, with the number of its image and the image's size in pixels."""

    image: int
    text: str
    width: int
    height: int


def prepare(config: DataConfig, out: pathlib.Path, source: pathlib.Path | None, show: Show) -> SelectedImages:
    """Ingests, scores, selects and buckets images; records of an earlier run are used again.

    Args:
      config: group `data` of the job.
      out: folder that receives `records/` with the selection, and `demo_set/` if there is no source.
      source: folder of the user's images; None: the embedded demo set.
      show: function that draws the reports.

    Raises:
      ValueError: if the source cannot be read, or no image is left.
    """
    records = out / "records"
    if not (records / MANIFEST).is_file():
        if source is None:
            source = out / "demo_set"
            if not (source / "metadata.jsonl").is_file():
                write_demo_folder(source)
        show(ingest(source, records).table())
    else:
        log.info("reusing %s of an earlier run; to train on other images choose another --out", records)
    cascade.score(records, workers=config.workers or None)
    selection = select(records, config.thresholds)
    show(selection.table())
    if any(kept.conditions for kept in selection.kept):
        raise ValueError("the demo trains text-to-image only: exclude edits with data.thresholds.edits=False")
    write_selection(records / INDEX, selection)
    show(config.resolutions.report([(kept.width, kept.height) for kept in selection.kept]).table())
    chosen = images_of(records, selection.kept, config.resolutions, config.channels)
    if not len(chosen):
        raise ValueError(
            f"no image of {records} is left after selection and buckets: the tables above say why; relax "
            "data.thresholds, data.max_upscale or data.max_cropped, or give more images and a new --out"
        )
    return chosen


def images_of(records: pathlib.Path, kept: Iterable[Kept], resolutions: Resolutions, channels: int) -> SelectedImages:
    """The pixels of the selected records that fit a bucket, each in its largest one."""
    fits = [(row, resolutions.fits(row.width, row.height)[0][1]) for row in kept]
    chosen = tuple(SelectedImage(row.index, fit.bucket, row.captions) for row, fit in fits if fit.left_out is None)
    return SelectedImages(RecordFolder(records), chosen, channels)


def captions_of(images: SelectedImages) -> list[Caption]:
    """Every selected caption of every image, in order."""
    return [
        Caption(index, caption.text, image.bucket.width, image.bucket.height)
        for index, image in enumerate(images.chosen)
        for caption in images.captions(index)
    ]
