"""Sample grids: reduced images, their arrangement, and their texts."""

import numpy as np
import pytest
from PIL import Image

from data_pipeline.samples.schema import Sample, Text
from qi2_jax.reporting.grid import in_ascii, lay_out
from qi2_jax.tasks.transformer import grids


def plain(red, height, width):
    """An image in a colour that letters do not have."""
    return np.full((height, width, 3), (red, 200, 200), np.uint8)


def test_images_are_reduced_to_a_cell_and_what_was_drawn_is_also_kept_whole():
    wide = np.random.default_rng(0).integers(0, 256, (300, 1200, 3), dtype=np.uint8)
    rows = [[plain(10, 700, 2 * grids.CELL), wide], [plain(30, 64, 32), plain(40, 64, 48)]]
    found = grids.drawing(["condition 1", "sample"], rows, [{"text": "a sign"}, {"text": "雨后"}])
    assert found.notes == {
        "columns": ["condition 1", "sample"],
        "samples": [{"text": "a sign"}, {"text": "雨后"}],
    }
    assert list(found.whole) == ["1"] and found.whole["1"] is wide
    height, width = found.pixels.shape[:2]
    assert 4 * grids.CELL < width < 4 * grids.CELL + 60 and 350 < height < 350 + 120, "two samples beside each other"
    tens, thirties = (np.argwhere((found.pixels == (value, 200, 200)).all(-1)) for value in (10, 30))
    assert np.ptp(tens, axis=0).tolist() == [349, grids.CELL - 1], "reduced in proportion"
    assert np.ptp(thirties, axis=0).tolist() == [63, 31], "not enlarged"


@pytest.mark.parametrize(("columns", "across"), [(1, 4), (2, 2), (3, 1), (5, 1)])
def test_samples_of_few_images_are_drawn_beside_each_other(columns, across):
    made = [[plain(0, 90, 90)] * columns for _ in range(6)]
    found = grids.drawing(["sample"] * columns, made, [{"text": "x"}] * 6).pixels
    dark = (found == (0, 200, 200)).all(-1)
    assert dark.sum(axis=1).max() == 90 * columns * across
    assert dark.sum(axis=0).max() >= 90 * -(-6 // across)
    assert found[:11].min() < 100, "heads are drawn"


def test_a_sample_that_was_encoded_without_its_text_shows_its_record():
    text = Text(np.zeros((3, 2), np.float32), (3,))
    sample = Sample(np.zeros((1, 1, 4), np.float32), (text,), record=17)
    assert grids.notes_of(sample, held_out=True) == {"text": None, "record": 17}
    grids.drawing(["sample"], [[plain(0, 64, 64)]], [grids.notes_of(sample, held_out=True)])
    sample = Sample(sample.latents, (Text(text.features, (3,), "a cup"),))
    assert grids.notes_of(sample, held_out=False) == {"text": "a cup"}


def test_texts_are_cut_to_their_images_and_titles_are_not():
    def drawn(text, title="x"):
        return np.asarray(lay_out([[Image.new("RGB", (64, 64), "red")]], [title], [text], 3))

    long, cut = drawn("word " * 1000), drawn("word " * 900)
    np.testing.assert_array_equal(long, cut)
    assert long.shape == drawn("").shape and (long != drawn("")).any()
    assert drawn("", "a title of many words").shape[1] > long.shape[1]
    assert in_ascii("a\n b") == "a b" and in_ascii("雨后") == "(2 characters that this font lacks)"
