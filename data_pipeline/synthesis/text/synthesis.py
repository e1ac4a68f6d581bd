"""Text-rich synthetic records: `qi2 data synth text`.

The first three strategies are those of the first Qwen-Image report:

| strategy | image                                                                 |
| -------- | --------------------------------------------------------------------- |
| pure     | paragraphs on plain backgrounds (`text.pure`)                         |
| scene    | text in real images, with perspective and lighting (`on_surface`)     |
| layout   | slides, posters, infographics, tables, comics (`text.layout`)         |
| glyphs   | lines of 5 to 20 pixels on plain and real backgrounds, for the VAE    |
| photo    | the same at many places of whole photographs (`text.photo`)           |

`photo` is made only where it is asked for; the others are the default.
Every caption (kind `text`, in English) quotes all written text in reading order and describes its appearance.
Paragraphs with characters that the typeface lacks are dropped. Paragraphs that are too long for 1,024 tokens are
shortened before they are drawn. Records have the place of every line of text. Sample number i is a function of the
seed and i alone.
"""

import io
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data_pipeline.buckets import Buckets
from data_pipeline.funnel import Tally, reasons
from data_pipeline.records.schema import Caption, Record
from data_pipeline.records.shards import check_output, write_new_shards
from data_pipeline.synthesis.lettering.fonts import FOLDERS, FontLibrary
from data_pipeline.synthesis.lettering.scripts import SCRIPTS, Script, find_scripts
from data_pipeline.synthesis.lettering.typesetting import Unsuitable
from data_pipeline.synthesis.rounds import until_enough
from data_pipeline.synthesis.text.corpus import BuiltinCorpus, Corpus, read_corpus
from data_pipeline.synthesis.text.glyphs import draw_glyphs
from data_pipeline.synthesis.text.job import MAX_CAPTION_TOKENS, Job, Sample, count_tokens
from data_pipeline.synthesis.text.layout import draw_layout
from data_pipeline.synthesis.text.on_surface import draw_scene
from data_pipeline.synthesis.text.photo import draw_photo
from data_pipeline.synthesis.text.pure import draw_pure
from data_pipeline.synthesis.text.report import TextReport
from data_pipeline.synthesis.text.scenes import Scenes

STRATEGIES: dict[str, Callable[[Job], Sample]] = {
    "pure": draw_pure,
    "scene": draw_scene,
    "layout": draw_layout,
    "glyphs": draw_glyphs,
    "photo": draw_photo,
}
DEFAULT = ("pure", "scene", "layout", "glyphs")
MAX_TRIES = 32  # attempts at a sample before its number is given up
SOURCE = "qi2-synthetic-text"
_OWN = "rendered by qi2 (Apache-2.0) with Noto fonts (OFL-1.1)"


@dataclass(frozen=True)
class Recipe:
    """Everything that sample number i depends on.

    Attributes:
      scenes: photographs to write on; None if the strategies need none.
      side: side in pixels of the square that gives the area of images of `pure`, `layout` and `photo`.
    """

    seed: int
    strategies: tuple[str, ...]
    scripts: tuple[Script, ...]
    fonts: FontLibrary
    corpus: Corpus
    scenes: Scenes | None
    side: int
    source: str

    def make(self, number: int) -> tuple[str, str, Record | None, list[tuple[str, str]]]:
        """Returns the strategy, the script code, the record or None, and (reason, text) of every dropped text."""
        strategy = self.strategies[number % len(self.strategies)]
        script = self.scripts[number // len(self.strategies) % len(self.scripts)]
        dropped: list[tuple[str, str]] = []
        for attempt in range(MAX_TRIES):
            rng = np.random.default_rng([self.seed, number, attempt])
            try:
                return strategy, script.code, self._draw(rng, number, strategy, script), dropped
            except Unsuitable as unsuitable:
                dropped.append((unsuitable.reason, unsuitable.text[:80]))
                if unsuitable.reason == "empty_corpus":
                    break
        return strategy, script.code, None, dropped

    def _draw(self, rng: np.random.Generator, number: int, strategy: str, script: Script) -> Record:
        languages = self.corpus.languages(script.code)
        if not languages:
            raise Unsuitable("empty_corpus", script.code)
        language = languages[rng.integers(len(languages))]
        sizes = Buckets.for_area(self.side).sizes
        sample = STRATEGIES[strategy](Job(rng, script, language, self.corpus, self.fonts, sizes, self.scenes))
        if count_tokens(sample.caption) > MAX_CAPTION_TOKENS:
            raise Unsuitable("caption_too_long", sample.texts[0])
        buffer = io.BytesIO()
        if strategy == "scene":
            sample.image.save(buffer, "JPEG", quality=95, subsampling=0)
        else:
            sample.image.save(buffer, "PNG")
        suffix = "jpg" if strategy == "scene" else "png"
        return Record(
            key=f"{strategy}/{number:08d}.{suffix}",
            image=buffer.getvalue(),
            captions=(Caption(sample.caption, "text", "en"),),
            source=self.source,
            licence=self._licence(sample, strategy),
            tags=(*sample.tags, f"script/{script.code}", f"language/{language}"),
            lines=sample.lines,
        )

    def _licence(self, sample: Sample, strategy: str) -> str | None:
        """The licences of all parts; None (unknown) if the licence of any part is unknown."""
        if self.corpus.licence is None:
            return None
        parts = [_OWN, self.corpus.licence]
        if sample.licence is not None:
            parts.append(f"picture: {sample.licence}")
        return "; ".join(parts)


def synthesize_text(
    out: Path | str,
    *,
    count: int = 1000,
    seed: int = 0,
    strategies: tuple[str, ...] = DEFAULT,
    scripts: tuple[str, ...] = tuple(SCRIPTS),
    fonts: tuple[Path, ...] = FOLDERS,
    corpus: Path | None = None,
    licence: str | None = None,
    scenes: Path | None = None,
    side: int = 1024,
    source: str = SOURCE,
    workers: int | None = None,
    records_per_shard: int = 256,
    progress: bool = True,
) -> TextReport:
    """Writes synthetic records to the new folder `out`; strategies and scripts take turns.

    The bytes depend on the arguments and on the versions of fonts and libraries, not on `workers`. Samples without a
    suitable text are replaced by further ones; `TextReport.shortfall` reports if there are still fewer than `count`.

    Args:
      out: new folder of records.
      count: number of samples to make.
      seed: seed of all random numbers.
      strategies: keys of STRATEGIES.
      scripts: codes of writing systems.
      fonts: folders of Noto fonts.
      corpus: corpus file, see `corpus.read_corpus`; None means the built-in phrases.
      licence: licence of the texts in `corpus`.
      scenes: folder of records to write on; None means the photographs of scikit-image.
      side: side in pixels of the square that gives the area of images of `pure`, `layout` and `photo`.
      source: name of the data set in every record.
      workers: number of processes; 1 means this process alone, None one per core.
      records_per_shard: number of records per file.
      progress: whether to show a progress bar.

    Raises:
      ValueError: for an invalid argument, or if no sample could be made; nothing is written then.
      ChildProcessError: if a worker process dies.
    """
    workers = (os.cpu_count() or 1) if workers is None else workers
    _check(strategies, ("count", count, 1), ("seed", seed, 0), ("workers", workers, 1), ("side", side, 256))
    check_output(out, records_per_shard)
    report, usable = TextReport(str(out), count), find_scripts(scripts)
    texts: Corpus = BuiltinCorpus() if corpus is None else _read_corpus(corpus, usable, licence, report)
    usable = tuple(script for script in usable if corpus is None or texts.languages(script.code))
    photographs = None if set(strategies) == {"pure"} else _scenes(scenes)
    library = FontLibrary(usable, fonts)
    recipe = Recipe(seed, tuple(dict.fromkeys(strategies)), usable, library, texts, photographs, side, source)
    with tqdm(total=count, desc="synth text", unit="img", disable=not progress, dynamic_ncols=True) as bar:
        stream = _make_records(recipe, report, workers, bar)
        write_new_shards(
            out,
            stream,
            records_per_shard=records_per_shard,
            if_empty=lambda: f"none of {count} samples could be made; dropped: {reasons(report.dropped)}",
        )
    return report


def _read_corpus(corpus: Path, usable: Sequence[Script], licence: str | None, report: TextReport) -> Corpus:
    """The texts of a corpus file; its lines are counted in the report."""
    texts = read_corpus(corpus, tuple(script.code for script in usable), licence, report.refused)
    report.usable_lines = texts.lines
    return texts


def _make_records(recipe: Recipe, report: TextReport, workers: int, bar: tqdm) -> Iterator[Record]:
    """Yields the records that could be made and counts the others in the report."""
    purpose = "making synthetic text"
    results = until_enough(recipe.make, report.asked, workers, purpose, lambda result: result[2] is not None)
    for _, (strategy, script, record, dropped) in results:
        for reason, text in dropped:
            report.dropped.setdefault(strategy, Tally()).add(reason, text)
        counts = report.given_up if record is None else report.made
        counts[strategy, script] = counts.get((strategy, script), 0) + 1
        if record is not None:
            bar.update()
            yield record


def _check(strategies: tuple[str, ...], *numbers: tuple[str, int, int]) -> None:
    for name, value, least in numbers:
        if value < least:
            raise ValueError(f"{name} is {value}; it must be at least {least}")
    unknown = [name for name in strategies if name not in STRATEGIES]
    if unknown or not strategies:
        raise ValueError(f"strategies {unknown or strategies} are unknown; choose from {', '.join(STRATEGIES)}")


def _scenes(folder: Path | None) -> Scenes:
    try:
        return Scenes(folder)
    except ImportError as error:
        raise ValueError(f"{error}, or name a folder of records with --scenes") from None
