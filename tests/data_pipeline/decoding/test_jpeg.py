import imagehash
import numpy as np
import pytest
from PIL import Image

from data_pipeline.decoding import jpeg
from data_pipeline.decoding.images import MIN_HALVED_SIDE, decode_image
from data_pipeline.filters import duplicates


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"quality": 20}])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_grey_and_half_are_those_of_pillow(picture, encoded, mode, options):
    image = picture(size=(700, 501)).convert(mode)
    data = encoded(image, "JPEG", **options)
    grey, half = jpeg.decode_grey(data), jpeg.decode_half(data)
    whole = decode_image(data).image
    assert abs(np.asarray(grey, int) - np.asarray(whole.convert("L"), int)).max() <= (
        0 if mode == "L" else 4
    )  # a colour out of range is clipped
    assert (half.mode, half.size) == ("RGB", (350, 251))
    assert abs(np.asarray(half, int)[:250] - np.asarray(whole.reduce(2), int)[:250]).mean() < 2


def test_damage_is_found_at_half_size_too(picture, encoded):
    data = encoded(picture(size=(700, 500)), "JPEG", quality=90)
    assert jpeg.decode_half(data) and jpeg.decode_grey(data)
    for damaged in (data[: len(data) // 2], data[:-2], data[:300] + b"\xff\xd9"):
        assert jpeg.decode_half(damaged) is None and jpeg.decode_grey(damaged) is None
    cmyk = encoded(picture(size=(700, 500)).convert("CMYK"), "JPEG")
    assert decode_image(cmyk, preview_first=True).image.tobytes() == decode_image(cmyk).image.tobytes()


def test_what_is_decoded_first_does_not_matter(picture, encoded):
    exif = Image.Exif()
    exif[0x0112] = 6
    for size in ((MIN_HALVED_SIDE, 300), (MIN_HALVED_SIDE - 1, 300)):
        data = encoded(picture(size=size), "JPEG", exif=exif)
        first, whole = decode_image(data, preview_first=True), decode_image(data)
        assert first.size == first.image.size == whole.size == size[::-1]
        assert (first.half is None) == (size[0] < MIN_HALVED_SIDE)
        assert first.grey.size == whole.grey.size and first.preview.size == whole.preview.size
        assert first.image.tobytes() == whole.image.tobytes()


def test_coded_digest_is_that_of_the_image_without_metadata(picture, encoded):
    image, exif = picture(size=(60, 40)), Image.Exif()
    exif[0x010E] = "a description"
    plain = jpeg.coded_digest(encoded(image, "JPEG"))
    assert jpeg.coded_digest(encoded(image, "JPEG", exif=exif, comment=b"a comment")) == plain
    others = [encoded(image, "JPEG", quality=74), encoded(image, "JPEG", progressive=True), b"", b"\xff\xd8\xff\xe1"]
    assert len({plain, *map(jpeg.coded_digest, others)}) == 5


def test_hashes_are_those_of_imagehash(picture):
    for seed in range(30):
        small = picture(seed).convert("L").resize((duplicates.SIDE, duplicates.SIDE))
        assert duplicates.perceptual_hash(np.asarray(small)) == str(imagehash.phash(small))
        assert duplicates.gradient_hash(np.asarray(small)) == str(imagehash.dhash(small))
