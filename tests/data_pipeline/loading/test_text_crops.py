"""Crops keep lines of text whole where that is possible, and all places that are equally good are drawn."""

import io
import itertools

import numpy as np
import pytest
from PIL import Image

from data_pipeline.buckets import Bucket
from data_pipeline.loading.crop_batches import CropStream
from data_pipeline.loading.crops import SelectedImage, SelectedImages, TextImage
from data_pipeline.loading.text_crops import draw_corner
from data_pipeline.records.schema import Line, Record
from data_pipeline.records.shards import RecordFolder, write_shards

IMAGE, CROP = (20, 24), (8, 10)


def seen(line, top, left, crop=CROP):
    """Whether a crop shows something of a line, and all that fits."""
    ranges = [(line[1], line[3], top, crop[0]), (line[0], line[2], left, crop[1])]
    shown = all(low < start + side and start < high for low, high, start, side in ranges)
    whole = all((start <= low and high <= start + side) or high - low > side for low, high, start, side in ranges)
    return shown, shown and whole


def best(lines, step, crop=CROP):
    places = {}
    for corner in itertools.product(*(range(0, size - side + 1, step) for size, side in zip(IMAGE, crop, strict=True))):
        found = [seen(line, *corner, crop) for line in lines]
        places[corner] = sum(shown for shown, _ in found), sum(whole for _, whole in found)
    cuts = {corner: shown - whole for corner, (shown, whole) in places.items()}
    good = {corner for corner, cut in cuts.items() if not cut and places[corner][1]}
    return good or {corner for corner, cut in cuts.items() if cut == min(cuts.values())}


@pytest.mark.parametrize("step", [1, 5])
@pytest.mark.parametrize(
    "lines",
    [
        [(3, 2, 9, 5)],
        [(0, 0, 8, 2), (0, 3, 9, 5), (12, 4, 20, 7), (2, 12, 7, 19)],
        [(0, 2, 24, 5), (0, 6, 24, 9), (0, 14, 24, 17)],  # longer than a crop: only their height counts
        [(left, top, left + 6, top + 5) for left in range(0, 18, 4) for top in range(0, 15, 3)],  # one is always cut
        [(0, 0, 6, 6), (4, 4, 14, 12)],  # one is cut wherever text is shown
    ],
)
def test_every_best_place_is_drawn_and_no_other(lines, step):
    expected, rng = best(lines, step), np.random.default_rng(0)
    drawn = [draw_corner(np.asarray(lines), IMAGE, CROP, rng, step) for _ in range(40 * len(expected))]
    assert set(drawn) == expected
    if len(expected) < 60:
        counts = np.asarray([drawn.count(corner) for corner in expected])
        assert counts.min() > 10 and counts.max() < 90  # 40 each on average


def test_crops_of_a_stream_depend_on_seed_and_number_alone():
    pixels = np.arange(20 * 24, dtype=np.uint8).reshape(20, 24, 1)
    image = TextImage(pixels, np.asarray([(3, 2, 9, 5)]))

    def drawn(seed):
        crops = CropStream([image], [0], CROP, seed).crops()
        return [crops[number].tobytes() for number in range(5)]

    assert drawn(0) == drawn(0) != drawn(1) and len(set(drawn(0))) > 1


def test_crops_of_a_stream_cut_no_line_and_mirror_none():
    pixels = np.tile(np.arange(24, dtype=np.uint8)[None, :, None], (20, 1, 1))
    line = 6, 2, 14, 5
    crops = CropStream([TextImage(pixels, np.asarray([line]))], [0], CROP, 0, step=5, mirrored=1.0).crops()
    lefts = {round((float(crops[number][0, 0, 0]) + 1) * 127.5) for number in range(20)}
    assert lefts == {5}  # 0 and 10 cut the line, and a mirrored crop begins with 14


def test_boxes_follow_the_image_into_its_bucket(tmp_path):
    pixels = np.full((120, 200, 3), 255, np.uint8)
    boxes = [(100, 20, 140, 40), (0, 50, 12, 60), (30, 100, 50, 120)]
    for left, top, right, bottom in boxes:
        pixels[top:bottom, left:right] = 0
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    lines = tuple(Line(str(number), box) for number, box in enumerate(boxes))
    write_shards(tmp_path, [Record("a", buffer.getvalue(), (), "test", lines=lines)], records_per_shard=1)
    images = SelectedImages(RecordFolder(tmp_path), (SelectedImage(0, Bucket(64, 64), ()),), 3)
    found = images.with_text(0)
    assert np.array_equal(found.pixels, images[0]) and len(found.lines_n4) == 2  # one lies outside the square
    blank = found.pixels.copy()
    for left, top, right, bottom in found.lines_n4:
        ink = found.pixels[top:bottom, left:right] < 128
        assert ink[1:-1, 1:-1].all() and ink.shape[0] in (11, 12)
        blank[max(0, top - 2) : bottom + 2, max(0, left - 2) : right + 2] = 255
    assert blank.min() > 250
