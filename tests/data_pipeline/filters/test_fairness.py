"""Good images that filters easily mistake for bad ones are kept in stage 4; their spoilt counterparts are dropped.

A few images of `tests/benchmarks/filter_fairness.py`, which measures more.
"""

import pytest
from PIL import Image, ImageOps

from data_pipeline.decoding.images import decode_image
from data_pipeline.filters import CASCADE
from data_pipeline.filters.base import Candidate
from data_pipeline.filters.border import BORDER
from data_pipeline.filters.entropy import ENTROPY
from data_pipeline.filters.quality import QUALITY
from data_pipeline.records.schema import Caption, Record
from data_pipeline.selection.rules import RULES, caption_reasons
from data_pipeline.selection.thresholds import Thresholds
from tests.benchmarks import filter_fairness as fairness
from tests.data_pipeline.planted import bytes_of


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    found = fairness.photographs()
    return [*found[:4], found[5]]  # without the fifth, a night sky that is dark by nature


def reasons(image: Image.Image, form: str = "PNG") -> set[str | None]:
    """Reasons for dropping an image, except for its captions."""
    data = bytes_of(image, form)
    record = Record("key", data, (Caption("x"),), "test")
    candidate = Candidate(record, decode_image(data), None)
    row = {"description.tags": []}
    for filter in (ENTROPY, QUALITY, BORDER):
        (scores,) = filter.score([candidate])
        row |= {f"{filter.name}.{name}": value for name, value in scores.items()}
    return {RULES[name](row, fairness.STAGE) for name in ("entropy", "quality", "border")} - {None}


def test_dark_and_high_key_photographs_are_as_sharp_as_in_daylight(images):
    for image in images:
        for change in (lambda one: one, lambda one: fairness.exposed(one, -3), fairness.high_key):
            assert reasons(change(image)) == set()
            assert reasons(change(fairness.blurred(image)), "JPEG") == {"blurred"}


@pytest.mark.parametrize("shape", fairness.SHAPES)
def test_products_on_a_plain_ground_have_no_border(images, shape):
    for image, ground in zip(images, ("white", "#d8d8d8", "black"), strict=False):
        assert reasons(fairness.packshot(image, shape, ground), "JPEG") == set()


def test_photographs_in_frames_have_one(images):
    for image in images[:4]:
        for frame in (ImageOps.expand(image, 80, "white"), fairness.letterboxed(image)):
            assert reasons(frame, "JPEG") == {"border"}


def test_shapes_of_equal_luma_are_not_empty():
    for seed in range(4):
        assert reasons(fairness.equal_luma(seed)) == reasons(fairness.equal_luma(seed), "JPEG") == set()
        assert reasons(fairness.chroma_noise(seed)) >= {"noise"}


def test_dithered_and_screened_pages_are_not_noise(images):
    for image in images:
        dots = image.convert("1").convert("L"), fairness.ordered_dither(image), fairness.screened(image)
        for page in (*dots, fairness.twice(dots[0]), fairness.line_art(image)):
            assert reasons(page) == set()
    assert reasons(fairness.comic(images, 0)) == set()
    for seed in range(4):
        assert "noise" in reasons(fairness.dithered_noise(seed))


def caption_reason(text: str, *, edit: bool) -> str | None:
    caption = Caption(text, "instruction" if edit else "general")
    record = Record("key", b"x", (caption,), "test", None, (b"x",) if edit else ())
    row = {"description.conditions": int(edit), "alignment.unrelated": [False]}
    for filter in (one for one in CASCADE if one.name in ("description", "caption_length", "instruction")):
        (scores,) = filter.score([Candidate(record, None, None)])
        row = {f"{filter.name}.{name}": value for name, value in scores.items()} | row
    return caption_reasons(row, Thresholds())[0]


@pytest.mark.parametrize("text", ["zoom in", "上色", "去雨", "remove fog", "colorize"])
def test_short_instructions_are_complete(text):
    assert caption_reason(text, edit=True) is None


def test_instructions_without_letters_and_short_captions_are_too_short():
    assert caption_reason("?!", edit=True) == caption_reason("a", edit=True) == "too_short"
    assert caption_reason("zoom", edit=False) == "too_short"


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf_16_read_as_utf_8_is_not_a_caption(encoding):
    text = "a red boat on a lake".encode(encoding).decode()
    assert caption_reason(text, edit=False) == "control_character"
    assert caption_reason("a red boat\non a lake\tin summer", edit=False) is None
