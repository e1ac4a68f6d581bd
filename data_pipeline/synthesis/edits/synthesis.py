"""Exact edit pairs from the real images of a records folder: `qi2 data synth edits`.

| kind        | source -> target                                                                            |
| ----------- | ------------------------------------------------------------------------------------------- |
| text        | words on the image are changed, written, or removed (`edits.text`)                          |
| restoration | noise, blur, JPEG, rain, low light -> the original image (`edits.restoration`)              |
| tone        | saturation, white balance, exposure, black-and-white and back (`edits.tone`)                |
| insertion   | a cut-out object appears, with its shadow (`edits.objects`)                                 |
| removal     | the inverse                                                                                 |
| hue         | an object in another colour                                                                 |
| background  | an object on a plain background, a described one, or the background of a second source      |
| compose2    | an object of one source in the scene of another; the instruction names both by their number |
| compose3    | the objects of two sources in the scene of a third                                          |

Kinds take turns. The last six need cut-outs. Edit number i is a function of the seed and i alone, and no pixel outside
the edited region changes. Images within `max_side` keep their original bytes.
"""

import io
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from data_pipeline.funnel import Table, Tally, reasons
from data_pipeline.records.schema import MAX_NAME_CHARS, Record
from data_pipeline.records.shards import RecordFolder, check_output, write_new_shards
from data_pipeline.synthesis.edits import objects, restoration, text, tone
from data_pipeline.synthesis.edits.cutouts import CutoutFile, Unsuitable, find_cutouts, has_transparency
from data_pipeline.synthesis.edits.edit import Edit, Ingredients
from data_pipeline.synthesis.edits.scenes import MIN_SIDE
from data_pipeline.synthesis.lettering.fonts import FOLDERS, FontLibrary
from data_pipeline.synthesis.lettering.scripts import find_scripts
from data_pipeline.synthesis.rounds import shortfall, until_enough

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
WITH_CUTOUTS = ("insertion", "removal", "hue", "background", "compose2", "compose3")
ATTEMPTS = 12  # attempts at an edit before its number is given up
SOURCE = "qi2-synthetic-edits"


@dataclass(frozen=True)
class Recipe:
    """Everything that edit number i depends on.

    Attributes:
      images: folder of records with the real images.
      cutouts: files, or positions of records with transparency.
      kinds: keys of KINDS, which take turns.
      fonts: fonts for Latin and Chinese text; None if the kinds need none.
      seed: seed of all random numbers.
      max_side: side in pixels to which larger images are reduced.
      source: name of the data set in every record.
    """

    images: RecordFolder
    cutouts: tuple[CutoutFile | int, ...]
    kinds: tuple[str, ...]
    fonts: FontLibrary | None
    seed: int
    max_side: int
    source: str = SOURCE

    def make(self, number: int) -> tuple[str, Record | None, list[str]]:
        """Returns the kind, the record or None, and the reasons for which images or edits were drawn again."""
        kind = self.kinds[number % len(self.kinds)]
        drawn_again: list[str] = []
        ingredients = Ingredients(self.images, self.cutouts, self.max_side, self.fonts, drawn_again.append)
        for attempt in range(ATTEMPTS):
            try:
                edit = KINDS[kind](ingredients, np.random.default_rng([self.seed, number, attempt]))
                return kind, self._record(edit, kind, number), drawn_again
            except Unsuitable as reason:
                drawn_again.append(str(reason))
                if str(reason) == "no_cutouts":
                    break
        return kind, None, drawn_again

    def _record(self, edit: Edit, kind: str, number: int) -> Record:
        licences = list(dict.fromkeys(part.licence for part in edit.parts))
        known = None if None in licences else "; ".join(map(str, licences))  # unknown if the licence of any part is
        return Record(
            f"{kind}/{number:08d}: {' + '.join(dict.fromkeys(part.name for part in edit.parts))}"[:MAX_NAME_CHARS],
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
    """The result of a run.

    Attributes:
      folder: folder of the records.
      asked: number of edits that were asked for.
      made: number of edits, by kind.
      not_made: edits that were given up, by kind: their numbers and the last reason for each.
      drawn_again: unsuitable images and edits that were drawn again, by kind.
      without_cutouts: kinds that were left out because there are no cut-outs.
    """

    folder: str
    asked: int
    made: dict[str, int]
    not_made: dict[str, Tally]
    drawn_again: dict[str, Tally]
    without_cutouts: tuple[str, ...] = ()

    @property
    def records(self) -> int:
        """Number of edits that were made."""
        return sum(self.made.values())

    @property
    def shortfall(self) -> str | None:
        """Why there are fewer edits than asked for; None if there are enough."""
        return shortfall(self.records, self.asked, sum(self.not_made.values(), Tally()).counts)

    def table(self) -> Table:
        """A table with a row per kind."""
        title = f"{self.records:,} of {self.asked:,} edits in {self.folder}"
        view = Table(title, ("kind", "made", "not made", "drawn again"), right=("made",))
        for kind, count in self.made.items():
            reasons = (
                ", ".join(f"{reason} {n:,}" for reason, n in sorted(tallies[kind].counts.items()))
                for tallies in (self.not_made, self.drawn_again)
            )
            view.add_row(kind, f"{count:,}", *reasons)
        for kind in self.without_cutouts:
            view.add_row(kind, "0", "left out: needs cut-outs (--cutouts, or records with transparency)", "")
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
        numbers = {"asked": self.asked, "records": self.records, "shortfall": self.shortfall}
        return {"folder": self.folder, **numbers, "kinds": kinds, "without_cutouts": list(self.without_cutouts)}


def synthesize_edits(
    images: Path | str,
    out: Path | str,
    *,
    count: int = 1000,
    seed: int = 0,
    kinds: tuple[str, ...] | None = None,
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

    The bytes depend on the arguments and on the versions of fonts and libraries, not on `workers`. Edits without a
    suitable image are replaced by further ones; `EditsReport.shortfall` reports if there are still fewer than `count`.

    Args:
      images: folder of records with real images; edits in it are skipped.
      out: new folder of records.
      count: number of edits to make.
      seed: seed of all random numbers.
      kinds: keys of KINDS; None means all, except those that need cut-outs if there are none.
      cutouts: folder of cut-outs, see `cutouts.find_cutouts`; None means the records with transparency.
      cutouts_licence: licence of the files in `cutouts`.
      fonts: folders of Noto fonts.
      max_side: side in pixels to which larger images are reduced.
      source: name of the data set in every record.
      workers: number of processes; 1 means this process alone, None one per core.
      records_per_shard: number of records per file.
      progress: whether to show progress bars.

    Raises:
      ValueError: for an invalid argument, or if no edit could be made; nothing is written then.
      ChildProcessError: if a worker process dies.
    """
    workers = (os.cpu_count() or 1) if workers is None else workers
    _check(kinds, ("count", count, 1), ("seed", seed, 0), ("workers", workers, 1), ("max_side", max_side, MIN_SIDE))
    check_output(out, records_per_shard)
    records = _open_records(images)
    needed = any(kind in WITH_CUTOUTS for kind in kinds or KINDS)
    usable = _cutouts(records, cutouts, cutouts_licence, progress) if needed else ()
    chosen, left_out = _kinds(kinds, bool(usable), images)
    library = FontLibrary(find_scripts(("Latn", "Hans")), fonts) if "text" in chosen else None
    recipe = Recipe(records, usable, chosen, library, seed, max_side, source)
    tallies = {kind: Tally() for kind in chosen}, {kind: Tally() for kind in chosen}
    report = EditsReport(str(out), count, dict.fromkeys(chosen, 0), *tallies, left_out)
    with tqdm(total=count, desc="synth edits", unit="edit", disable=not progress, dynamic_ncols=True) as bar:
        stream = _make_records(recipe, report, workers, bar)
        write_new_shards(
            out,
            stream,
            records_per_shard=records_per_shard,
            if_empty=lambda: f"none of {count} edits could be made from {images}: {reasons(report.not_made)}",
        )
    return report


def _open_records(images: Path | str) -> RecordFolder:
    records = RecordFolder(images)
    if not len(records):
        raise ValueError(f"{images} contains no records")
    return records


def _make_records(recipe: Recipe, report: EditsReport, workers: int, bar: tqdm) -> Iterator[Record]:
    """Yields the records that could be made and counts the others in the report."""
    results = until_enough(recipe.make, report.asked, workers, "making edits", lambda result: result[1] is not None)
    for number, (kind, record, drawn_again) in results:
        if record is None:
            report.not_made[kind].add(drawn_again.pop(), str(number))
        for reason in drawn_again:
            report.drawn_again[kind].add(reason, str(number))
        if record is not None:
            bar.update()
            report.made[kind] += 1
            yield record


def _check(kinds: tuple[str, ...] | None, *numbers: tuple[str, int, int]) -> None:
    for name, value, least in numbers:
        if value < least:
            raise ValueError(f"{name} is {value}; it must be at least {least}")
    unknown = [name for name in kinds or () if name not in KINDS]
    if unknown or kinds == ():
        raise ValueError(f"kinds {unknown or kinds} are unknown; choose from {', '.join(KINDS)}")


def _kinds(
    kinds: tuple[str, ...] | None, has_cutouts: bool, images: Path | str
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The kinds to make, and the kinds that are left out because there are no cut-outs."""
    wanted = tuple(dict.fromkeys(KINDS if kinds is None else kinds))
    impossible = () if has_cutouts else tuple(kind for kind in wanted if kind in WITH_CUTOUTS)
    if impossible and kinds is not None:
        raise ValueError(
            f"kinds {', '.join(impossible)} need cut-outs, and no record of {images} has transparency; name a folder "
            "of objects with --cutouts, or leave these kinds out"
        )
    return tuple(kind for kind in wanted if kind not in impossible), impossible


def _cutouts(
    records: RecordFolder, folder: Path | None, licence: str | None, progress: bool
) -> tuple[CutoutFile | int, ...]:
    if folder is not None:
        return tuple(find_cutouts(folder, licence))
    bar = tqdm(records, total=len(records), desc="cut-outs", unit="img", disable=not progress, dynamic_ncols=True)
    return tuple(number for number, record in enumerate(bar) if has_transparency(record))
