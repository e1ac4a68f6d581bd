"""OCR of text pages: edit distances, what is compared, and what an empty text counts."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont

from qi2_jax.evaluation import ocr, summary
from qi2_jax.evaluation.images import Item
from qi2_jax.evaluation.linear_code import LinearCode
from qi2_jax.evaluation.measuring import measure
from qi2_jax.evaluation.ocr import Engine, PageReader, edit_distance, similarity
from tests.optional_packages import require_packages


def by_definition(a: str, b: str) -> int:
    if not a or not b:
        return len(a) + len(b)
    return min(
        by_definition(a[1:], b) + 1, by_definition(a, b[1:]) + 1, by_definition(a[1:], b[1:]) + (a[0] != b[0])
    )  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(st.text("ab日😀", max_size=5), st.text("ab日😀", max_size=5))
def test_edit_distance_equals_its_definition(a, b):
    assert edit_distance(a, b) == by_definition(a, b)


def test_similarity_is_relative_to_the_longer_text():
    assert similarity("kitten", "sitting") == pytest.approx(1 - 3 / 7)
    assert (similarity("", ""), similarity("ab", ""), similarity("", "ab"), similarity("ab", "ab")) == (1, 0, 0, 1)


class Flattens:
    """A code that makes every image grey, except bright ones."""

    name, factor, channels, digest = "flat", 16, 1, None

    def reconstruct(self, images: np.ndarray) -> np.ndarray:
        return np.where(images > 200, images, 128).astype(np.uint8)


def test_pages_without_text_are_left_out_and_counted():
    levels = {"a": 250, "b": 100, "c": 10, "d": 220, "e": 50}
    says = {250: "same", 100: "kitten", 128: "sitting", 10: "", 220: "", 50: ""}
    items = [Item(name, "pages", np.full((16, 16, 3), level, np.uint8)) for name, level in levels.items()]
    items.append(Item("f", "photo", np.full((16, 16, 3), 30, np.uint8)))
    calls = []
    read = lambda pixels: calls.append(1) or says[int(pixels[0, 0, 0])]
    pages = PageReader(("pages",), read, "fake")
    first, second = (measure(Flattens(), Flattens(), items, None, pages, worst=1) for _ in range(2))
    assert len(calls) == 3 * 5  # the originals are read once, their reconstructions once for each model
    assert [image.ned for image in first.images] == [1, pytest.approx(1 - 3 / 7), None, None, None, None]
    rows = summary.rows_of([first, second])
    read_row, photos, together = rows[0], rows[2], rows[-1]
    assert (read_row.set, read_row.category, read_row.resolution) == ("pages 16p", "pages", "16p")
    for row in (read_row, together):
        assert row.ned == pytest.approx((1 + 1 - 3 / 7) / 2)
        assert (row.pages, row.pages_without_text, row.invented_text) == (5, 3, 2)
    assert (photos.ned, photos.pages, together.category) == (None, 0, None)
    table = str(summary.table("title", rows, []))
    assert "2 of 5" in table and "0.7857" in table
    each = summary.to_dict(first)["images"]
    assert each[1]["texts"] == {"original": "kitten", "rebuilt": "sitting"} and each[5]["texts"] is None


def test_a_reconstruction_without_text_scores_zero():
    item = Item("a", "text", np.full((16, 16, 3), 10, np.uint8))
    pages = PageReader(("text",), lambda pixels: "words" if pixels[0, 0, 0] == 10 else "", "fake")
    (image,) = measure(Flattens(), Flattens(), [item], None, pages, worst=1).images
    assert image.ned == 0


def test_sets_are_category_and_resolution_in_order_with_every_figure():
    sizes = [("photo", 1024, 16), ("photo", 256, 16), ("text", 256, 16), ("photo", 64, 64)]
    rng = np.random.default_rng(0)
    items = [Item(str(n), kind, rng.integers(0, 256, (h, w, 3), np.uint8)) for n, (kind, h, w) in enumerate(sizes)]
    code = LinearCode(16, np.zeros(768), np.eye(768)[:, :64], 1)
    result = measure(code, code, items, None, None, worst=0)
    rows = summary.rows_of([result])
    assert [(row.set, row.images) for row in rows] == [("photo 64p", 2), ("photo 128p", 1), ("text 64p", 1), ("all", 4)]
    for row in rows:
        images = [
            i for i in result.images if row.category in (None, i.category) and row.resolution in (None, i.resolution)
        ]
        pixels = [image.width * image.height for image in images]
        pooled = np.average([image.mean_squared_error for image in images], weights=pixels)
        assert row.psnr == pytest.approx(np.mean([image.psnr for image in images]))
        assert row.psnr_pooled == pytest.approx(10 * math.log10(255**2 / pooled))
        assert row.ssim == pytest.approx(np.mean([image.ssim for image in images]))


def test_missing_engine_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(ocr.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"needs the package rapidocr, which is not installed: pip install 'qi2\[ocr\]'"
    ):
        Engine()


def test_the_engine_reads_lines_in_order():
    require_packages("rapidocr")
    image = Image.new("RGB", (256, 96), "navy")
    draw = ImageDraw.Draw(image)
    for row, line in enumerate(("A page of text,", "its second line.")):
        draw.text((10, 10 + 40 * row), line, "white", ImageFont.load_default(20))
    engine = Engine()
    assert engine(np.asarray(image)) == "A page of text,its second line."
    assert engine(np.full((64, 64, 3), 255, np.uint8)) == "" and "PP-OCRv6" in engine.name
