"""The records that a curriculum makes if it is not given any."""

import pathlib

from data_pipeline.demo.cutouts import write_cutouts
from data_pipeline.demo.dataset import write_demo_folder
from data_pipeline.records.shards import MANIFEST
from data_pipeline.scoring import cascade
from data_pipeline.sources.ingest import ingest
from data_pipeline.synthesis.edits.synthesis import synthesize_edits
from data_pipeline.synthesis.lettering.fonts import FontLibrary
from data_pipeline.synthesis.lettering.scripts import find_scripts
from data_pipeline.synthesis.text.synthesis import synthesize_text
from qi2_jax.workflows.config import CorpusConfig
from qi2_jax.workflows.reports import Show

SCRIPTS = ("Latn", "Hans")  # scripts of the text-rich images
CUTOUTS_LICENCE = "drawn by qi2 (Apache-2.0)"


def check_fonts(config: CorpusConfig, out: pathlib.Path) -> None:
    """Raises a ValueError if fonts are missing for images that are still to be made; edits contain text too."""
    counts = {"edits": config.edits, "texts": config.texts}
    made = (out / "records" / MANIFEST).is_file()
    if not made and any(count and not (out / name / MANIFEST).is_file() for name, count in counts.items()):
        more = (
            " (`make test-data` does), give your own records with --data, or make no such images with corpus.edits=0 "
            "corpus.texts=0, if no stage trains on edits"
        )
        FontLibrary(find_scripts(SCRIPTS), hint=more)


def make_corpus(config: CorpusConfig, out: pathlib.Path, show: Show) -> None:
    """Makes scored records of the demo set, of synthetic edits of its images, and of text-rich images.

    Args:
      config: numbers of edits and of text-rich images.
      out: folder that receives `records/` and their sources; results of an earlier call are reused.
      show: function that draws the reports.
    """
    records = out / "records"
    if not (records / MANIFEST).is_file():
        sources = [out / "pictures"]
        if not (sources[0] / MANIFEST).is_file():
            if not (out / "demo_set" / "metadata.jsonl").is_file():
                write_demo_folder(out / "demo_set")
            show(ingest(out / "demo_set", sources[0]).table())
        if config.edits:
            sources.append(out / "edits")
            _make_edits(config, sources[0], out, show)
        if config.texts:
            sources.append(out / "texts")
            _make_texts(config, sources[-1], show)
        show(ingest(sources, records).table())
    cascade.score(records, workers=config.workers or None)


def _make_edits(config: CorpusConfig, images: pathlib.Path, out: pathlib.Path, show: Show) -> None:
    if (out / "edits" / MANIFEST).is_file():
        return
    write_cutouts(out / "cutouts")
    report = synthesize_edits(
        images,
        out / "edits",
        count=config.edits,
        cutouts=out / "cutouts",
        cutouts_licence=CUTOUTS_LICENCE,
        max_side=config.side,
        workers=config.workers or None,
    )
    show(report.table())


def _make_texts(config: CorpusConfig, out: pathlib.Path, show: Show) -> None:
    if (out / MANIFEST).is_file():
        return
    workers = config.workers or None
    report = synthesize_text(out, count=config.texts, side=config.side, scripts=SCRIPTS, workers=workers)
    for table in report.tables():
        show(table)
