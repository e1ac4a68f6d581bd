"""Fonts and drawn text: shaped, in the right direction, never cut off, and refused when a glyph is missing."""

import numpy as np
import pytest
from PIL import Image

from data_pipeline.synthesis.lettering.fonts import FOLDERS, FontLibrary, MissingGlyph
from data_pipeline.synthesis.lettering.scripts import CORE, SCRIPTS, find_scripts
from data_pipeline.synthesis.lettering.typesetting import Style, Unsuitable, draw_block, length, set_text
from tests.debian import require_debian


@pytest.fixture(scope="module")
def library():
    require_debian("fonts-noto-core", FOLDERS[0])
    require_debian("fonts-noto-cjk", FOLDERS[1])
    return FontLibrary(tuple(SCRIPTS.values()))


def typeface(library, code, style=None):
    return next(face for face in library.typefaces[code] if not face.bold and style in (None, face.style))


def drawn(library, code, text, language, *, size=(900, 300), **style):
    """Coverage 0..255 of a text drawn in a margin of 40 pixels, and its block."""
    block = set_text(text, language, Style(typeface(library, code), 40, 40, **style), *size)
    image = Image.new("L", (size[0] + 80, size[1] + 80), 0)
    draw_block(image, block, 40, 40, 255)
    return np.asarray(image), block


def columns_of_ink(pixels):
    found = np.flatnonzero(pixels.max(0) > 96)
    return found[0], found[-1]


@pytest.mark.parametrize(
    ("code", "own", "foreign"), [("Thai", "ไทย", "12.5%"), ("Hebr", "שלום", "(12/5)"), ("Geor", "თბილისი", "ABC")]
)
def test_what_a_script_font_lacks_comes_from_noto_sans_in_one_piece(library, code, own, foreign):
    runs = typeface(library, code).runs(f"{own} {foreign}", "und")
    assert [text.strip() for _, text in runs] == [own, foreign]
    assert "NotoSans-Regular" in runs[1][0].path and "NotoSans-Regular" not in runs[0][0].path


@pytest.mark.parametrize(
    ("code", "text"),
    [("Latn", "a ☃ b"), ("Thai", "ไทย 漢"), ("Hebr", "שלום 漢"), ("Jpan", "日本🜚"), ("Deva", "हिन्दी 😀")],
)
def test_one_missing_glyph_is_found_without_drawing(library, code, text):
    missing = next(c for c in text if c in "☃漢🜚😀")
    with pytest.raises(MissingGlyph, match=f"U\\+{ord(missing):04X}"):
        typeface(library, code).runs(text, "und")
    with pytest.raises(Unsuitable) as raised:
        set_text(text, "und", Style(typeface(library, code), 30, 20), 500, 300)
    assert raised.value.reason == "missing_glyph"


@pytest.mark.parametrize(
    ("code", "language", "text", "first"),
    [
        ("Hebr", "he", "שלום עולם", "ש"),
        ("Arab", "ar", "دار دور", "د"),
        ("Latn", "en", "Rest", "R"),
        ("Thai", "th", "กบ", "ก"),
    ],
)
def test_lines_begin_on_the_side_of_their_script_and_are_not_mirrored(library, code, language, text, first):
    line, _ = drawn(library, code, text, language)
    letter, _ = drawn(library, code, first, language)
    left, right = columns_of_ink(letter)
    assert np.array_equal(line[:, left : right + 1], letter[:, left : right + 1])
    start, end = columns_of_ink(line)
    assert end == right if SCRIPTS[code].rtl else start == left


def test_numbers_in_a_line_from_right_to_left_run_from_left_to_right(library):
    line, _ = drawn(library, "Hebr", "המחיר: 125", "he")
    number, _ = drawn(library, "Hebr", "125", "he")
    (left, right), start = columns_of_ink(number), columns_of_ink(line)[0]
    # The number ends the line, so it stands at the far left.
    assert np.array_equal(line[:, start : start + right - left + 1], number[:, left : right + 1])


def test_letters_are_joined_and_conjuncts_made(library):
    arabic, hindi = typeface(library, "Arab"), typeface(library, "Deva")
    assert length("سلام", arabic, 60, "ar") < 0.8 * sum(length(c, arabic, 60, "ar") for c in "سلام")
    assert length("क्ष", hindi, 60, "hi") < 0.8 * length("कष", hindi, 60, "hi")


def test_vertical_text_runs_down_and_then_to_the_left_with_vertical_punctuation(library):
    text = "日本語。" * 6
    pixels, block = drawn(library, "Jpan", text, "ja", size=(400, 200), vertical=True)
    assert "".join(block.lines) == text and len(block.lines) > 2
    one, _ = drawn(library, "Jpan", block.lines[0], "ja", size=(400, 200), vertical=True)
    left, right = columns_of_ink(one)
    assert right - left < 60 and columns_of_ink(pixels)[1] == right  # the first column is the rightmost
    stop, _ = drawn(library, "Jpan", "日。", "ja", size=(60, 200), vertical=True)
    above, _ = drawn(library, "Jpan", "日", "ja", size=(60, 200), vertical=True)
    rows, columns = np.nonzero((stop > 96) & (above < 32))
    left, right = columns_of_ink(above)
    assert columns.min() > (left + right) / 2  # on the right of its square, where horizontal text has it on the left
    assert rows.min() > np.flatnonzero(above.max(1))[-1]


@pytest.mark.parametrize("align", ["start", "centre", "end"])
@pytest.mark.parametrize("code", ["Latn", "Hebr"])
def test_alignment(library, code, align):
    pixels, _ = drawn(library, code, {"Latn": "Hall", "Hebr": "חלה"}[code], "und", align=align)
    left, right = columns_of_ink(pixels)
    side = {"start": 40, "centre": 490, "end": 940}[align]
    if align != "centre" and code == "Hebr":
        side = 980 - side
    nearest = (left + right) / 2 if align == "centre" else left if side == 40 else right
    assert abs(nearest - side) < 8


def test_text_in_columns_follows_the_direction(library):
    for code, text in (("Latn", "word " * 20), ("Hebr", "מילה " * 33)):
        pixels, block = drawn(library, code, text.strip(), "und", size=(600, 400), columns=2, gap=40)
        assert block.rows < len(block.lines) < 2 * block.rows  # the second column has room at its foot
        foot = pixels[40 + (block.rows - 1) * block.pitch :]
        left, right = columns_of_ink(foot)
        assert left > 340 if SCRIPTS[code].rtl else right < 340


def test_what_does_not_fit_is_refused_and_never_cut(library):
    face = typeface(library, "Latn")
    with pytest.raises(Unsuitable, match="does_not_fit"):
        set_text("many words " * 50, "en", Style(face, 40, 20), 200, 200)
    with pytest.raises(Unsuitable, match="does_not_fit"):
        set_text("Donaudampfschifffahrtsgesellschaft", "de", Style(face, 40, 30), 200, 200)
    assert set_text("Donaudampfschifffahrtsgesellschaft", "de", Style(face, 40, 8), 200, 200).size < 14
    block = set_text("inside", "en", Style(face, 40, 40), 200, 100)
    with pytest.raises(Unsuitable, match="does_not_fit"):
        draw_block(Image.new("L", (100, 100)), block, 60, 0, 255)


def test_missing_fonts_name_the_debian_package(tmp_path):
    with pytest.raises(ValueError, match=rf"NotoSansThai-Regular.ttf of Thai.*apt-get install {CORE}"):
        FontLibrary((SCRIPTS["Thai"],), (tmp_path,))
    with pytest.raises(ValueError, match=r"NotoSansCJK-Regular.ttc.*apt-get install fonts-noto-cjk"):
        FontLibrary((SCRIPTS["Jpan"],), (tmp_path,))
    with pytest.raises(ValueError, match=r"Xxxx.*choose from Latn"):
        find_scripts(("Latn", "Xxxx"))
