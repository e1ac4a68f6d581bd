"""Reads synthetic text back with Tesseract: clean lines of the built-in corpus in ten languages.

Shared by the test and by `benchmarks/synthetic_text_ocr.py`.
"""

import re
import unicodedata
from pathlib import Path

import numpy as np
from PIL import Image

from data_pipeline.synthesis.lettering.fonts import FOLDERS, FontLibrary
from data_pipeline.synthesis.lettering.linebreak import graphemes, sentences, shorten
from data_pipeline.synthesis.lettering.scripts import SCRIPTS, script_of_language
from data_pipeline.synthesis.lettering.typesetting import Style, draw_block, set_text
from data_pipeline.synthesis.text.corpus import BuiltinCorpus
from qi2_jax.evaluation import ocr
from tests.debian import require_debian

TESSDATA = next(iter(sorted(Path("/usr/share/tesseract-ocr").glob("*/tessdata"))), Path("/usr/share/tesseract-ocr"))
LANGUAGES = {  # BCP 47: Tesseract
    "en": "eng",
    "zh-Hans": "chi_sim",
    "ja": "jpn",
    "ko": "kor",
    "ru": "rus",
    "ar": "ara",
    "hi": "hin",
    "th": "tha",
    "el": "ell",
    "vi": "vie",
}
SIZE = 44  # pixels per em
SHORTEST, LONGEST = 10, 42  # graphemes of a line; in a shorter one a single misreading would weigh too much


def require(language: str) -> None:
    """Skips or, under CI, fails where fonts or language data are missing."""
    require_debian("fonts-noto-core", FOLDERS[0])
    require_debian("fonts-noto-cjk", FOLDERS[1])
    name = LANGUAGES[language]
    require_debian(f"tesseract-ocr-{name.replace('_', '-')}", TESSDATA / f"{name}.traineddata")


def draw_lines(language: str, count: int, seed: int = 0) -> list[tuple[str, Image.Image]]:
    """(text, black line on white) of random sentences in the regular typefaces of the script."""
    rng, corpus, code = np.random.default_rng([seed, *language.encode()]), BuiltinCorpus(), script_of_language(language)
    typefaces = [face for face in FontLibrary((SCRIPTS[code],)).typefaces[code] if not face.bold]
    found = []
    while len(found) < count:
        choices = sentences(corpus.paragraph(rng, code, language), language)
        sentence = choices[rng.integers(len(choices))].strip()
        text = shorten(sentence, language, lambda part: len(graphemes(part, language)) <= LONGEST)
        if len(graphemes(text, language)) < SHORTEST:
            continue
        block = set_text(text, language, Style(typefaces[rng.integers(len(typefaces))], SIZE, SIZE), 4000, 300)
        assert block.lines == (text,)
        image = Image.new("RGB", (block.width + 120, block.extent + 120), "white")
        draw_block(image, block, 60, 60, (0, 0, 0))
        ink = image.convert("L").point(lambda value: 255 - value).getbbox()
        found.append((text, image.crop((ink[0] - 20, ink[1] - 20, ink[2] + 20, ink[3] + 20))))
    return found


class Reader:
    """Tesseract for one language; a context."""

    def __init__(self, language: str):
        import tesserocr

        self._modes = tesserocr.PSM
        self._api = tesserocr.PyTessBaseAPI(path=str(TESSDATA), lang=LANGUAGES[language])

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._api.End()

    def read(self, image: Image.Image) -> str:
        """The text in the image of one line."""
        # If Tesseract finds no line (one Arabic line of twenty), the whole image is taken as the line.
        for mode in (self._modes.SINGLE_LINE, self._modes.RAW_LINE):
            self._api.SetPageSegMode(mode)
            self._api.SetImage(image)
            if text := self._api.GetUTF8Text().strip():
                return text
        return ""


def similarity(a: str, b: str) -> float:
    """1 - Levenshtein distance / length of the longer, 0..1, of composed text without spaces at ends and in excess.

    Spaces do not count in Chinese, Japanese and Thai, where Tesseract puts them between any two characters.
    """
    return ocr.similarity(_normal(a), _normal(b))


def _normal(text: str) -> str:
    text = re.sub(r"\s+", " ", unicodedata.normalize("NFKC", text)).strip()
    return re.sub(r"(?<=[\u0e00-\u9fff\uac00-\ud7a3]) | (?=[\u0e00-\u9fff])", "", text)
