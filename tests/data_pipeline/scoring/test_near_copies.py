"""Near duplicates of images: which copies are near, and which other images are not."""

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageEnhance, ImageFont

from data_pipeline.decoding.images import decode_image
from data_pipeline.filters.base import Candidate
from data_pipeline.filters.duplicates import DUPLICATES, thumbnail
from data_pipeline.records.schema import Caption, Record
from data_pipeline.records.shards import write_shards
from data_pipeline.scoring.cascade import score
from data_pipeline.scoring.pair_scores import read_pairs
from data_pipeline.scoring.pairs import compare_thumbnails, differences
from data_pipeline.selection.select import select
from data_pipeline.selection.thresholds import Thresholds
from tests.benchmarks.autoencoder_images import scenes


def difference(one: Image.Image, other: Image.Image) -> float:
    both = [np.frombuffer(thumbnail(image), np.uint8)[None] for image in (one, other)]
    assert differences(*both) == differences(*both[::-1])
    return float(differences(*both)[0])


def word(image: Image.Image, text: str, opacity: float = 1.0) -> Image.Image:
    written = image.copy()
    font = ImageFont.load_default(image.width // 6)
    ImageDraw.Draw(written).text((image.width / 2, image.height / 2), text, "white", font, "mm")
    return Image.blend(image, written, opacity)


def test_brightness_contrast_and_watermarks_are_near_and_other_words_and_colours_are_not(picture):
    image = picture(1, (480, 400))
    limit = Thresholds().near_difference
    assert difference(image, image) == 0
    for changed in (
        ImageEnhance.Brightness(image).enhance(1.3),
        ImageEnhance.Brightness(image).enhance(0.6),
        ImageEnhance.Contrast(image).enhance(0.7),
        word(image, "SAMPLE", 0.35),
    ):
        assert difference(image, changed) <= limit
    assert difference(word(image, "SUMMER"), word(image, "WINTER")) > limit
    assert difference(word(image, "SUMMER"), word(word(image, "SUMMER"), "SAMPLE", 0.3)) <= limit
    red, green, blue = image.split()
    assert difference(image, Image.merge("RGB", (blue, green, red))) > limit
    assert difference(Image.new("RGB", (64, 64), "white"), Image.new("RGB", (64, 64), "black")) > limit


def near_score(folder, records) -> dict[str, str | None]:
    write_shards(folder, records, records_per_shard=4)
    score(folder, workers=1, progress=False)
    selection = select(folder, Thresholds(min_side=30))
    return {
        record.key: selection.dropped[record.key].reason if record.key in selection.dropped else None
        for record in records
    }


def test_near_duplicates_survive_compression_scaling_and_turning(tmp_path, picture, encoded):
    exif = Image.Exif()
    exif[0x0112] = 6
    first = picture(1)
    turned = encoded(first.transpose(Image.Transpose.ROTATE_90), exif=exif)
    small = first.resize((150, 140), Image.Resampling.LANCZOS)
    files = [encoded(picture(2)), encoded(first), encoded(small), encoded(first, "JPEG", quality=30), turned]
    records = [Record(str(i), data, (Caption("a picture for a test"),), "s") for i, data in enumerate(files)]
    expected = dict(zip("01234", (None, None, "near", "near", "same_pixels"), strict=True))
    assert near_score(tmp_path, records) == expected


def _page(text: str, noisy: bool) -> Image.Image:
    image = Image.new("RGB", (512, 512), "white")
    ImageDraw.Draw(image).text((256, 256), text, fill="black", font=ImageFont.load_default(90), anchor="mm")
    if noisy:  # a scan: the same paper noise, and an entropy as high as a photograph's
        noise = np.random.default_rng(0).integers(-25, 1, (512, 512, 1))
        image = Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))
    return image


@pytest.mark.parametrize("noisy", [False, True])
def test_pages_with_other_words_do_not_collide(tmp_path, encoded, noisy):
    words = ("Room 204", "Room 205", "Room 2O4")
    records = [Record(text, encoded(_page(text, noisy)), (Caption("a sign at a door"),), "s") for text in words]
    assert set(near_score(tmp_path, records).values()) == {None}
    rows = DUPLICATES.score([_candidate(record) for record in records])
    hashes = [int(row["phash"], 16) for row in rows]  # these alone take them for one another
    assert all((hashes[0] ^ other).bit_count() <= 6 for other in hashes)


def test_flat_images_do_not_collide(tmp_path, encoded):
    images = [Image.new("RGB", (64, 64), colour) for colour in ("white", "grey", "black")]
    for image in images:
        ImageDraw.Draw(image).line((5, 32, 59, 32), "red", 3)
    records = [Record(str(i), encoded(image), (Caption("a thin red line"),), "s") for i, image in enumerate(images)]
    assert set(near_score(tmp_path, records).values()) == {None}
    assert read_pairs(tmp_path).near.size == 0


def test_edits_are_compared_as_a_whole(tmp_path, picture, encoded):
    clean, noisy = picture(1), picture(1).resize((200, 180)).resize((300, 280))
    snow, night = Caption("let it snow", "instruction"), Caption("make it night", "instruction")

    def edit(key, image, sources, instruction=snow, **options):
        sources = tuple(encoded(source, **options) for source in sources)
        return Record(
            key, encoded(image, **options), (instruction, Caption("a picture for a test")), "s", conditions=sources
        )

    again = {"format": "JPEG", "quality": 60}
    records = [
        edit("a", clean, [picture(2)]),
        edit("b copy", clean, [picture(2)]),
        edit("c other words", clean, [picture(2)], night),
        edit("d compressed", clean, [picture(2)], **again),
        edit("e other source", clean, [picture(3)]),
        edit("f two sources", clean, [picture(2), picture(3)]),
        edit("g other order", clean, [picture(3), picture(2)]),
        edit("h restored", picture(4), [noisy]),
        edit("i restored otherwise", picture(4), [clean]),
        edit("j lossless copy", clean, [picture(2)], compress_level=1),
        Record("k no edit", encoded(clean), (Caption("a picture for a test"),), "s"),
    ]
    found = near_score(tmp_path, records)
    assert {key: reason for key, reason in found.items() if reason} == {
        "b copy": "same_bytes",
        "d compressed": "near",
        "j lossless copy": "same_pixels",
    }


def test_thresholds_cannot_be_looser_than_the_bounds():
    for field in ({"near_distance": 9}, {"near_gradient": 5}, {"near_difference": 17.0}, {"near_min_entropy": 1.9}):
        with pytest.raises(ValueError, match=f"{next(iter(field))} is"):
            Thresholds(**field)


def _candidate(record: Record):
    return Candidate(record, decode_image(record.image), None)


def _shot(image: Image.Image, box: tuple[float, float, float, float], noise: float = 0.0) -> Image.Image:
    """Part of an image, as shares of its size, with noise."""
    width, height = image.size
    part = image.crop((round(box[0] * width), round(box[1] * height), round(box[2] * width), round(box[3] * height)))
    levels = np.asarray(part) + np.random.default_rng(0).normal(0, noise, np.asarray(part).shape)
    return Image.fromarray(levels.clip(0, 255).astype(np.uint8))


def _cells(image: Image.Image) -> np.ndarray:
    return np.frombuffer(thumbnail(image), np.uint8)[None]


def test_crops_and_bursts_are_near_and_other_words_are_not(tmp_path, picture, encoded):
    """Crops of 10 % of width and height; frames that are shifted by 2 %, noisy and brighter."""
    first, second = picture(1, (480, 400)), picture(2, (480, 400))
    shots = {
        "a whole": first,
        "b middle": _shot(first, (0.05, 0.05, 0.95, 0.95)),
        "c corner": _shot(first, (0, 0, 0.9, 0.9)),
        "d slice": _shot(first, (0.02, 0.0, 1.0, 0.95)),
        "e frame": _shot(second, (0.0, 0.02, 0.96, 0.98), noise=3),
        "f frame": ImageEnhance.Brightness(_shot(second, (0.03, 0.0, 0.99, 0.96), noise=3)).enhance(1.1),
    }
    records = [
        Record(key, encoded(shot, "JPEG", quality=85), (Caption("a picture for a test"),), "s")
        for key, shot in shots.items()
    ]
    assert near_score(tmp_path, records) == dict.fromkeys(shots, "near") | {"a whole": None, "e frame": None}
    near = read_pairs(tmp_path).near
    corner = near[(near["left"] == 0) & (near["right"] == 2)]
    assert corner["overlap"][0] == pytest.approx(0.81, abs=0.03)
    summer, winter = word(first, "SUMMER"), word(_shot(first, (0.02, 0.0, 1.0, 0.95)), "WINTER")
    limit = Thresholds().near_difference
    assert compare_thumbnails(_cells(summer), _cells(winter), np.array([True]))[0] > limit
    assert compare_thumbnails(_cells(first), _cells(second), np.array([True]))[0] > limit


def test_scenes_that_an_image_connects_are_one():
    """Otherwise the benchmark would train on scenes of its unseen images."""

    def image(rises: int) -> Image.Image:
        steps = np.where(np.arange(64) < rises, 3, -3).reshape(8, 8)
        grey = 128 + np.concatenate([np.zeros((8, 1)), np.cumsum(steps, axis=1)], axis=1)
        return Image.fromarray(grey.astype(np.uint8))

    first, second, between, other = (image(rises) for rises in (0, 16, 8, 40))
    assert scenes([first, second, other]) == [0, 1, 2]
    assert scenes([first, second, other, between]) == [0, 0, 2, 0]
