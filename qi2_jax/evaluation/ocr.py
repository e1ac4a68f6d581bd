"""OCR of text pages, and how alike the texts of an image and of its reconstruction are.

The engine is PP-OCR, as in OmniDoc-TokenBench, here in the version that the package `rapidocr` contains with its
weights. It reads Chinese, Japanese and languages in Latin letters, and finds the lines itself.

Dims: `H` `W` pixels.
"""

import hashlib
import importlib.metadata
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from qi2_jax.evaluation.images import Item

MAX_SIDE = 8192  # pixels: the engine would shrink a larger image, and by default one above 736
MIN_CONFIDENCE = 0.5  # of a line; other lines are left out


class Engine:
    """PP-OCR in memory, on one CPU thread.

    Attributes:
      name: name and version, for the record of an evaluation.

    Raises:
      ValueError: if the package is not installed.
    """

    def __init__(self) -> None:
        if importlib.util.find_spec("rapidocr") is None:
            raise ValueError("OCR needs the package rapidocr, which is not installed: pip install 'qi2[ocr]'")
        from rapidocr import OCRVersion, RapidOCR

        self.name = f"PP-OCRv6 small (rapidocr {importlib.metadata.version('rapidocr')})"
        settings: dict[str, Any] = {
            "Global.log_level": "error",
            "Global.text_score": MIN_CONFIDENCE,
            "Global.max_side_len": MAX_SIDE,
            # The classifier of lines that are upside down turns some lines that are not.
            "Global.use_cls": False,
            "Det.ocr_version": OCRVersion("PP-OCRv6"),
            "Rec.ocr_version": OCRVersion("PP-OCRv6"),
            "Det.limit_type": "max",
            "Det.limit_side_len": MAX_SIDE,
            "EngineConfig.onnxruntime.intra_op_num_threads": 1,
            "EngineConfig.onnxruntime.inter_op_num_threads": 1,
        }
        self._engine: Any = RapidOCR(params=settings)

    def __call__(self, pixels: UInt8[np.ndarray, "H W 3"]) -> str:
        """The lines that the engine finds, in reading order, joined without separators; "" if there are none."""
        found = self._engine(np.ascontiguousarray(pixels[..., ::-1]))  # it takes BGR
        return "".join(found.txts or ())


class Texts(NamedTuple):
    """What OCR reads in an image and in its reconstruction."""

    original: str
    rebuilt: str


class PageReader:
    """Reads the images of some categories and their reconstructions.

    Args:
      categories: categories of text pages; other images are not read.
      read: function that returns the text of an image, such as an `Engine`.
      engine: name and version of the engine, for the record of an evaluation.
    """

    def __init__(self, categories: tuple[str, ...], read: Callable[[UInt8[np.ndarray, "H W 3"]], str], engine: str):
        self.categories, self.engine, self._read = categories, engine, read
        self._originals: dict[bytes, str] = {}  # every model is compared with the same originals

    def __call__(self, item: Item, rebuilt: UInt8[np.ndarray, "H W 3"]) -> Texts | None:
        """The two texts; None for an image of another category."""
        if item.category not in self.categories:
            return None
        key = hashlib.sha256(repr(item.pixels.shape).encode() + item.pixels.tobytes()).digest()
        if key not in self._originals:
            self._originals[key] = self._read(item.pixels)
        return Texts(self._originals[key], self._read(rebuilt))


def similarity(a: str, b: str) -> float:
    """1 - edit distance / length of the longer text, 0..1; two empty texts are alike."""
    return 1 - edit_distance(a, b) / max(len(a), len(b), 1)


def edit_distance(a: str, b: str) -> int:
    """The Levenshtein distance: the least number of characters to insert, delete or replace."""
    codes = np.frombuffer(b.encode("utf-32-le", "surrogatepass"), np.uint32)
    places = np.arange(len(b) + 1)
    row = places
    for count, character in enumerate(a, start=1):
        replaced_or_deleted = np.minimum(row[:-1] + (codes != ord(character)), row[1:] + 1)
        # Each insertion moves one place to the right and costs 1, so the best place to start from is a running minimum.
        row = np.minimum.accumulate(np.append(count, replaced_or_deleted) - places) + places
    return int(row[-1])
