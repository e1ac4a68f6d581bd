import json

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from data_pipeline.filters import CASCADE, Candidate
from data_pipeline.filters.duplicates import DUPLICATES, group_equal, group_near, parse_fingerprints
from data_pipeline.filters.orientation import CONTRADICTIONS, ORIENTATION
from data_pipeline.filters.resolution import RESOLUTION
from data_pipeline.images import decode_image, over_white
from data_pipeline.records import Caption, Record


def candidate(data: bytes) -> Candidate:
    return Candidate(Record("key", data, (Caption("x"),), "test"), decode_image(data), None)


def test_filters_give_exactly_their_columns_as_json(picture, encoded):
    candidates = [candidate(encoded(picture(seed, size=(40, 30)))) for seed in range(3)]
    for filter in CASCADE:
        rows = filter.score(candidates)
        assert [set(row) for row in rows] == [set(filter.columns)] * 3
        assert json.loads(json.dumps(rows)) == rows
        assert rows[1:] == filter.score(candidates[1:]), f"{filter.name} depends on the batch"


def _exif(orientation: int, size: tuple[int, int] | None = None) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    if size:
        exif[0x8769] = {0xA002: size[0], 0xA003: size[1]}
    return exif


XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="%d"/></x:xmpmeta>'


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, (None, "none", None)),
        ({"exif": _exif(0)}, (0, "none", None)),
        ({"exif": _exif(1)}, (1, "none", None)),
        ({"exif": _exif(3)}, (3, "rotate_180", None)),
        ({"exif": _exif(6, (60, 40))}, (6, "rotate_270", None)),
        ({"exif": _exif(6, (40, 60))}, (6, "rotate_270", "already_turned")),
        ({"exif": _exif(1, (40, 60))}, (1, "none", None)),
        ({"exif": _exif(9)}, (9, "none", "invalid_value")),
        ({"exif": _exif(6), "xmp": XMP % 6}, (6, "rotate_270", None)),
        ({"exif": _exif(6), "xmp": XMP % 1}, (6, "rotate_270", "xmp_disagrees")),
        ({"xmp": XMP % 8}, (8, "rotate_90", None)),
        ({"exif": b"Exif\0\0MM garbage"}, (None, "none", None)),
    ],
)
def test_orientation(picture, encoded, options, expected):
    (row,) = ORIENTATION.score([candidate(encoded(picture(size=(60, 40)), "JPEG", **options))])
    assert (row["exif"], row["transform"], row["contradiction"]) == expected
    assert row["contradiction"] in {None, *CONTRADICTIONS}


def test_turned_square_does_not_contradict_itself(picture, encoded):
    (row,) = ORIENTATION.score([candidate(encoded(picture(size=(40, 40)), "JPEG", exif=_exif(6, (40, 40))))])
    assert row["contradiction"] is None


def test_resolution_is_that_of_the_upright_picture(picture, encoded):
    (row,) = RESOLUTION.score([candidate(encoded(picture(size=(90, 60)), exif=_exif(6)))])
    assert row == {"width": 60, "height": 90, "short_side": 60, "pixels": 5400, "aspect": 1.5}


def near(*files: bytes, **thresholds) -> list[int]:
    rows = [
        {f"duplicates.{name}": value for name, value in row.items()} for row in DUPLICATES.score(map(candidate, files))
    ]
    entropies = np.array([row["duplicates.entropy"] for row in rows])
    defaults = {"max_distance": 6, "max_difference": 12, "min_entropy": 3.0}
    return group_near(*parse_fingerprints(rows), entropies, **(defaults | thresholds))


def test_near_duplicates_survive_compression_scaling_and_turning(picture, encoded):
    first, second = picture(1), picture(2)
    small = first.resize((150, 140), Image.Resampling.LANCZOS)
    turned = encoded(first.transpose(Image.Transpose.ROTATE_90), exif=_exif(6))
    files = [encoded(second), encoded(first), encoded(small), encoded(first, "JPEG", quality=30), turned]
    assert near(*files) == [0, 1, 1, 1, 1]


def _page(text: str, noisy: bool) -> Image.Image:
    image = Image.new("RGB", (512, 512), "white")
    ImageDraw.Draw(image).text((256, 256), text, fill="black", font=ImageFont.load_default(90), anchor="mm")
    if noisy:  # a scan: the same paper noise, and an entropy as high as a photograph's
        noise = np.random.default_rng(0).integers(-25, 1, (512, 512, 1))
        image = Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))
    return image


@pytest.mark.parametrize("noisy", [False, True])
def test_pages_with_other_words_do_not_collide(encoded, noisy):
    pages = [encoded(_page(text, noisy)) for text in ("Room 204", "Room 205", "Room 2O4")]
    entropies = [row["entropy"] for row in DUPLICATES.score(map(candidate, pages))]
    assert all(entropy > 3 for entropy in entropies) == noisy
    # The perceptual hash alone takes them for one another: that is what the guards are for.
    assert near(*pages, min_entropy=0.0, max_difference=255) == [0, 0, 0]
    assert near(*pages) == [0, 1, 2]


def test_solid_pictures_do_not_collide(encoded):
    files = [encoded(Image.new("RGB", (64, 64), colour)) for colour in ("white", "grey", "black")]
    assert near(*files, min_entropy=0.0, max_difference=255) != [0, 1, 2]
    assert near(*files) == near(*files, min_entropy=0.0) == [0, 1, 2]


def test_pixel_hash_sees_through_formats_but_not_through_alpha(picture, encoded):
    image = picture(size=(40, 30))
    opaque, faint = image.convert("RGBA"), image.convert("RGBA")
    faint.putalpha(254)
    files = [encoded(image), encoded(image, compress_level=1), encoded(image, "BMP"), encoded(opaque), encoded(faint)]
    rows = DUPLICATES.score(map(candidate, files))
    assert group_equal([row["pixels_sha256"] for row in rows]) == [0, 0, 0, 0, 4]
    assert group_equal([row["bytes_sha256"] for row in rows]) == [0, 1, 2, 3, 4]


def test_pixel_hash_knows_the_shape(encoded):
    files = [encoded(Image.new("RGB", size)) for size in ((40, 30), (30, 40))]
    wide, tall = DUPLICATES.score(map(candidate, files))
    assert wide["pixels_sha256"] != tall["pixels_sha256"]


def test_fingerprints_look_at_transparent_pictures_on_white(picture, encoded):
    image = picture(size=(64, 64)).convert("RGBA")
    image.paste((0, 0, 0, 0), (0, 0, 32, 64))
    rows = DUPLICATES.score(candidate(encoded(one)) for one in (image, over_white(image)))
    assert [rows[0][name] for name in ("phash", "thumbnail", "entropy")] == [
        rows[1][name] for name in ("phash", "thumbnail", "entropy")
    ]


def test_groups_are_components_and_do_not_depend_on_blocks(monkeypatch):
    hashes = np.array(
        [0, 0xFFFF << 32, 0b1111, 0xFF, 0xFFF], dtype=np.uint64
    )  # a chain 0 - 2 - 3 - 4, four bits a step
    thumbnails = np.zeros((5, 4), np.uint8)
    options = {"max_distance": 4, "max_difference": 3, "min_entropy": 3.0}
    entropies = np.full(5, 5.0)
    assert group_near(hashes, thumbnails, entropies, **options) == [0, 1, 0, 0, 0]
    monkeypatch.setattr("data_pipeline.filters.duplicates._PAIRS_AT_ONCE", 1)
    monkeypatch.setattr("data_pipeline.filters.duplicates._CONFIRMED_AT_ONCE", 1)
    assert group_near(hashes, thumbnails, entropies, **options) == [0, 1, 0, 0, 0]
    thumbnails[3, 1] = 4  # the second comparison breaks the chain
    assert group_near(hashes, thumbnails, entropies, **options) == [0, 1, 0, 3, 4]
    entropies[2] = 2.9  # so does flatness
    assert group_near(hashes, thumbnails, entropies, **options) == [0, 1, 2, 3, 4]
    assert group_near(hashes[:0], thumbnails[:0], entropies[:0], **options) == []
