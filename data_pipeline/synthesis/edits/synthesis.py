"""Exact edit pairs from the real pictures of a records folder: `qi2 data synth edits`.

| kind        | source -> target                                                                            |
| ----------- | ------------------------------------------------------------------------------------------- |
| text        | words on the picture are changed, written, or removed (`edit_text`)                         |
| restoration | noise, blur, JPEG, rain, low light -> the picture as it came (`edit_restoration`)           |
| tone        | saturation, white balance, exposure, black-and-white and back (`edit_tone`)                 |
| insertion   | a cut-out object appears, with its shadow (`edit_objects`)                                  |
| removal     | the inverse                                                                                 |
| hue         | an object in another colour                                                                 |
| background  | an object before a plain ground, a described one, or that of a second source                |
| compose2    | an object of one source in the scene of another; the instruction names both by their number |
| compose3    | two objects of two sources in the scene of a third                                          |

Edit number i is a function of the seed and i alone, and outside of what an edit changes not a pixel differs. Pictures
that need not be reduced to `max_side` keep the bytes in which they came.
"""

import io
import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from data_pipeline.funnel import Table, Tally
from data_pipeline.records.schema import MAX_NAME_CHARS, Record
from data_pipeline.records.shards import RecordFolder, write_shards
from data_pipeline.synthesis.edits import objects, restoration, text, tone
from data_pipeline.synthesis.edits.cutouts import CutoutFile, Unsuitable, find_cutouts, has_transparency
from data_pipeline.synthesis.edits.edit import Edit, Ingredients
from data_pipeline.synthesis.edits.scenes import MIN_SIDE
from data_pipeline.synthesis.lettering.fonts import FOLDERS, FontLibrary
from data_pipeline.synthesis.lettering.scripts import find_scripts
from data_pipeline.workers import in_order

KINDS: dict[str, Callable[[Ingredients, np.random.Generator], Edit]] = {
    "text": text.text,
    "restoration": restoration.restoration,
    "tone": tone.tone,
    "insertion": objects.insertion,
    "removal": objects.removal,
    "hue": objects.hue,
    "background": objects.background,
    "compose2": objects.compose2,
    "compose3": objects.compose3,
}
ATTEMPTS = 12  # whole edits that are begun until one succeeds
SOURCE = "qi2-synthetic-edits"


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what edit number i is.

    Attributes:
      pictures: folder of the real pictures.
      cutouts: files, or positions of pictures that have transparency.
      kinds: some of KINDS, which take turns.
      fonts: of Latin and Chinese text; None: the kinds need none.
      max_side: larger pictures are reduced to it, in pixels.
      source: name of the data set in every record.
    """

    pictures: RecordFolder
    cutouts: tuple[CutoutFile | int, ...]
    kinds: tuple[str, ...]
    fonts: FontLibrary | None
    seed: int
    max_side: int
    source: str = SOURCE

    def make(self, number: int) -> tuple[str, Record | None, list[str]]:
        """(kind, record or None, why pictures and whole edits were drawn again, the last reason last)."""
        kind = self.kinds[number % len(self.kinds)]
        drawn_again: list[str] = []
        take = Ingredients(self.pictures, self.cutouts, self.max_side, self.fonts, drawn_again.append)
        for attempt in range(ATTEMPTS):
            try:
                edit = KINDS[kind](take, np.random.default_rng([self.seed, number, attempt]))
                return kind, self._record(edit, kind, number), drawn_again
            except Unsuitable as reason:
                drawn_again.append(str(reason))
                if str(reason) == "no_cutouts":
                    break
        return kind, None, drawn_again

    def _record(self, edit: Edit, kind: str, number: int) -> Record:
        licences = list(dict.fromkeys(part.licence for part in edit.made_of))
        known = None if None in licences else "; ".join(map(str, licences))  # as good as that of its least known part
        return Record(
            f"{kind}/{number:08d}: {' + '.join(dict.fromkeys(part.name for part in edit.made_of))}"[:MAX_NAME_CHARS],
            _encoded(edit.target),
            edit.instructions,
            self.source,
            None if known is None else known[:MAX_NAME_CHARS],
            tuple(_encoded(source) for source in edit.sources),
            edit.tags,
        )


def _encoded(image: Image.Image | bytes) -> bytes:
    if isinstance(image, bytes):
        return image
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=4)
    return buffer.getvalue()


@dataclass(frozen=True)
class EditsReport:
    """What a run made.

    Attributes:
      made: edits of each kind.
      not_made: of each kind, the last reason of every edit that was given up, with its number.
      drawn_again: of each kind, pictures and draws that did not suit and were replaced by others.
    """

    folder: str
    made: dict[str, int]
    not_made: dict[str, Tally]
    drawn_again: dict[str, Tally]

    def table(self) -> Table:
        """A table with a row per kind."""
        title = f"{sum(self.made.values()):,} edits in {self.folder}"
        view = Table(title, ("kind", "made", "not made", "drawn again"), right=("made",))
        for kind, count in self.made.items():
            reasons = (
                ", ".join(f"{reason} {n:,}" for reason, n in sorted(tallies[kind].counts.items()))
                for tallies in (self.not_made, self.drawn_again)
            )
            view.add_row(kind, f"{count:,}", *reasons)
        return view

    def to_dict(self) -> dict[str, Any]:
        kinds = {
            kind: {
                "made": count,
                "not_made": self.not_made[kind].to_dict(),
                "drawn_again": self.drawn_again[kind].counts,
            }
            for kind, count in self.made.items()
        }
        return {"folder": self.folder, "records": sum(self.made.values()), "kinds": kinds}


def synthesize_edits(
    pictures: Path | str,
    out: Path | str,
    *,
    count: int = 1000,
    seed: int = 0,
    kinds: tuple[str, ...] = tuple(KINDS),
    cutouts: Path | None = None,
    cutouts_licence: str | None = None,
    fonts: tuple[Path, ...] = FOLDERS,
    max_side: int = 1024,
    source: str = SOURCE,
    workers: int | None = None,
    records_per_shard: int = 256,
    progress: bool = True,
) -> EditsReport:
    """Writes exact edit pairs to the new folder `out`; kinds take turns.

    The bytes depend on the arguments and on the versions of fonts and libraries, not on `workers`.

    Args:
      pictures: records folder; edits in it are passed over.
      count: edits to make; fewer come out where no picture suits.
      cutouts: see `cutouts.find_cutouts`; None: the records that have transparency.
      cutouts_licence: of the files in `cutouts`.
      fonts: folders of Noto fonts.
      max_side: see `Recipe`.
      workers: processes; 1: this one alone; None: one per core.

    Raises:
      ValueError: naming the argument that cannot work, or when nothing could be made; nothing is written then.
      RuntimeError: when a worker process dies.
    """
    workers = (os.cpu_count() or 1) if workers is None else workers
    numbers = ("count", count, 1), ("seed", seed, 0), ("workers", workers, 1), ("max_side", max_side, MIN_SIDE)
    for name, value, least in numbers:
        if value < least:
            raise ValueError(f"{name} is {value}; it must be at least {least}")
    unknown = [name for name in kinds if name not in KINDS]
    if unknown or not kinds:
        raise ValueError(f"kinds {unknown or kinds} are unknown; choose from {', '.join(KINDS)}")
    kinds = tuple(dict.fromkeys(kinds))
    records = RecordFolder(pictures)
    if not len(records):
        raise ValueError(f"{pictures} holds no records")
    library = FontLibrary(find_scripts(("Latn", "Hans")), fonts) if "text" in kinds else None
    recipe = Recipe(
        records, _cutouts(records, cutouts, cutouts_licence, progress), kinds, library, seed, max_side, source
    )
    report = EditsReport(str(out), dict.fromkeys(kinds, 0), {k: Tally() for k in kinds}, {k: Tally() for k in kinds})

    def made(bar: tqdm) -> Iterator[Record]:
        for number, (kind, record, drawn_again) in enumerate(in_order(recipe.make, count, workers, "making edits")):
            bar.update()
            if record is None:
                report.not_made[kind].add(drawn_again.pop(), str(number))
            for reason in drawn_again:
                report.drawn_again[kind].add(reason, str(number))
            if record is not None:
                report.made[kind] += 1
                yield record

    with tqdm(total=count, desc="synth edits", unit="edit", disable=not progress, dynamic_ncols=True) as bar:
        stream = made(bar)
        first = next(stream, None)
        if first is None:
            reasons = {kind: tally.counts for kind, tally in report.not_made.items()}
            raise ValueError(f"none of {count} edits could be made from {pictures}: {reasons}")
        write_shards(out, itertools.chain([first], stream), records_per_shard=records_per_shard)
    return report


def _cutouts(
    records: RecordFolder, folder: Path | None, licence: str | None, progress: bool
) -> tuple[CutoutFile | int, ...]:
    if folder is not None:
        return tuple(find_cutouts(folder, licence))
    bar = tqdm(records, total=len(records), desc="cut-outs", unit="img", disable=not progress, dynamic_ncols=True)
    return tuple(number for number, record in enumerate(bar) if has_transparency(record))
