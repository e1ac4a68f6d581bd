"""Text pages to judge autoencoders on: `python -m tests.benchmarks.text_pages OUT [COUNT] [SEED]`.

Writes COUNT (default 40) images of 256 x 256 pixels, each with its text beside it, into OUT/latin and as many into
OUT/chinese. As in OmniDoc-TokenBench, glyphs have 10 pixels per em in Latin and 16 in Chinese. Every page is filled
with whole lines of the built-in corpus, in one of the Noto typefaces and in two colours of readable contrast. Then

    qi2 eval vae --data OUT --ocr latin --ocr chinese --model RUN

compares what OCR reads in the pages and in their reconstructions. This script says how well it reads the pages.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

from data_pipeline.synthesis.lettering.colours import COLOURS, choose, readable_on
from data_pipeline.synthesis.lettering.fonts import FontLibrary
from data_pipeline.synthesis.lettering.linebreak import shorten
from data_pipeline.synthesis.lettering.scripts import DISPLAY, SCRIPTS, script_of_language
from data_pipeline.synthesis.lettering.typesetting import Block, Style, Unsuitable, draw_block, set_text
from data_pipeline.synthesis.text.corpus import BuiltinCorpus
from qi2_jax.evaluation.ocr import Engine, similarity

SIDE, MARGIN = 256, 8  # pixels
KINDS = {"latin": ("en", 10), "chinese": ("zh-Hans", 16)}  # folder: language, pixels per em
MAX_BOLD = 0.25  # share of pages in bold type


def draw_page(seed: int, language: str, size: int, part: int | None = None) -> tuple[Image.Image, str]:
    """A page of one typeface, and its lines joined without separators.

    Args:
      seed: seed of everything that is random.
      language: language of the text.
      size: pixels per em.
      part: 0 or 1, each of which has half of the typefaces; None: all of them.
    """
    rng, code = np.random.default_rng([seed, *language.encode()]), script_of_language(language)
    assert code is not None
    is_bold = rng.random() < MAX_BOLD
    typefaces = [face for face in FontLibrary((SCRIPTS[code],)).typefaces[code] if not face.style.endswith(DISPLAY)]
    typefaces = [face for face in typefaces if face.bold == is_bold]
    typefaces = typefaces if part is None else typefaces[part::2]
    style = Style(typefaces[rng.integers(len(typefaces))], size, size, leading=float(rng.uniform(1, 1.2)))
    ground = COLOURS[choose(rng)]
    ink = COLOURS[readable_on(rng, ground)]
    image, lines, top = Image.new("RGB", (SIDE, SIDE), ground), [], MARGIN
    while (block := _next(rng, code, language, style, SIDE - MARGIN - top)) is not None:
        draw_block(image, block, MARGIN, top, ink)
        lines += block.lines
        top += block.extent
    return image, "".join(lines)


def _next(rng: np.random.Generator, code: str, language: str, style: Style, height: int) -> Block | None:
    """The beginning of a random paragraph that fits; None if no word does."""

    def fits(text: str) -> bool:
        try:
            set_text(text, language, style, SIDE - 2 * MARGIN, height)
        except Unsuitable as unsuitable:
            if unsuitable.reason != "does_not_fit":
                raise
            return False
        return True

    text = shorten(BuiltinCorpus().paragraph(rng, code, language), language, fits)
    return None if text is None else set_text(text, language, style, SIDE - 2 * MARGIN, height)


def main(out: Path, count: int, seed: int) -> None:
    engine = Engine()
    print(f"{engine.name}, similarity of what it reads to the text (1 - edit distance / longer length)")
    for name, (language, size) in KINDS.items():
        (out / name).mkdir(parents=True)
        lengths, scores = [], []
        for number in range(count):
            image, text = draw_page(seed * count + number, language, size)
            image.save(out / name / f"{number:04d}.png")
            (out / name / f"{number:04d}.txt").write_text(text + "\n", encoding="utf-8")
            lengths.append(len(text))
            scores.append(similarity(text, engine(np.asarray(image))))
        print(
            f"{name}: {count} pages of {min(lengths)} to {max(lengths)} characters, {size} pixels per em; "
            f"mean {np.mean(scores):.4f}, lowest {min(scores):.4f}"
        )


if __name__ == "__main__":
    arguments = [*sys.argv[1:], *("40", "0")[len(sys.argv) - 2 :]]
    main(Path(arguments[0]), int(arguments[1]), int(arguments[2]))
