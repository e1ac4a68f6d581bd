"""The corpus that a curriculum makes where no data is named."""

import pathlib
from typing import Any

from rich.console import Console

from data_pipeline.demo.cutouts import write_cutouts
from data_pipeline.demo.dataset import write_demo_folder
from data_pipeline.records.shards import MANIFEST
from data_pipeline.scoring import cascade
from data_pipeline.sources.ingest import ingest
from data_pipeline.synthesis.edits.synthesis import synthesize_edits
from data_pipeline.synthesis.lettering.fonts import FontLibrary
from data_pipeline.synthesis.lettering.scripts import find_scripts
from data_pipeline.synthesis.text.synthesis import synthesize_text

SCRIPTS = ("Latn", "Hans")  # of the texts in pictures that are made here


def check_fonts(config: Any, out: pathlib.Path) -> None:
    """Refuses a corpus that is still to be made where the fonts of its texts are missing; edits write texts, too."""
    asked = {"edits": config.edits, "texts": config.texts}
    made = (out / "records" / MANIFEST).is_file()
    if not made and any(count and not (out / name / MANIFEST).is_file() for name, count in asked.items()):
        more = (
            " (`make test-data` does), bring records of your own with --data, or make none with corpus.edits=0 "
            "corpus.texts=0, where no stage gives edits a share"
        )
        FontLibrary(find_scripts(SCRIPTS), more=more)


def make_corpus(config: Any, out: pathlib.Path, console: Console) -> None:
    """Scored records of the embedded pictures, of edits made from them, and of text-rich pictures."""
    records = out / "records"
    workers = config.workers or None
    if not (records / MANIFEST).is_file():
        sources = [
            out / "pictures",
            *([out / "edits"] if config.edits else []),
            *([out / "texts"] if config.texts else []),
        ]
        if not (sources[0] / MANIFEST).is_file():
            if not (out / "demo_set" / "metadata.jsonl").is_file():
                write_demo_folder(out / "demo_set")
            console.print(ingest(out / "demo_set", sources[0]).table())
        if config.edits and not (out / "edits" / MANIFEST).is_file():
            write_cutouts(out / "cutouts")
            licence = "drawn by qi2 (Apache-2.0)"
            edits = synthesize_edits(
                sources[0],
                out / "edits",
                count=config.edits,
                cutouts=out / "cutouts",
                cutouts_licence=licence,
                max_side=config.side,
                workers=workers,
            )
            console.print(edits.table())
        if config.texts and not (out / "texts" / MANIFEST).is_file():
            texts = synthesize_text(
                out / "texts", count=config.texts, side=config.side, scripts=SCRIPTS, workers=workers
            )
            for table in texts.tables():
                console.print(table)
        console.print(ingest(sources, records).table())
    cascade.score(records, workers=workers)
