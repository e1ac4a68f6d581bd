import json
import struct

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from data_pipeline.decoding.images import UndecodableImage, decode_image
from data_pipeline.filters import CASCADE
from data_pipeline.filters.base import Candidate
from data_pipeline.filters.border import BORDER
from data_pipeline.filters.caption_length import CAPTION_LENGTH
from data_pipeline.filters.compression import COMPRESSION
from data_pipeline.filters.duplicates import DUPLICATES
from data_pipeline.filters.entropy import ENTROPY
from data_pipeline.filters.instruction import INSTRUCTION_TEXT
from data_pipeline.filters.nsfw import NSFW
from data_pipeline.filters.orientation import CONTRADICTIONS, ORIENTATION
from data_pipeline.filters.quality import QUALITY
from data_pipeline.filters.resolution import RESOLUTION
from data_pipeline.records.schema import Caption, Record
from data_pipeline.selection.rules import RULES, caption_reasons
from data_pipeline.selection.thresholds import Thresholds
from qi2_jax.pixels import over_white
from qi2_jax.text.qwen_tokenizer import SPECIAL_TOKENS, build_qwen_tokenizer


def candidate(data: bytes) -> Candidate:
    return Candidate(Record("key", data, (Caption("x"),), "test"), decode_image(data), None)


def test_filters_give_exactly_their_columns_as_json(picture, encoded):
    formats = ("PNG", "JPEG", "WEBP")
    candidates = [candidate(encoded(picture(seed, size=(40, 30)), formats[seed])) for seed in range(3)]
    for filter in (filter for filter in CASCADE if filter.can_score):
        rows = filter.score(candidates)
        assert [set(row) for row in rows] == [set(filter.columns)] * 3
        assert json.loads(json.dumps(rows)) == rows
        for name, (kind, _) in filter.columns.items():
            values = [row[name] for row in rows if row[name] is not None]
            if kind in (int, bool, str):  # Parquet would round or refuse other types
                assert {type(value) for value in values} <= {kind}, f"{filter.name}.{name}"
        assert rows[1:] == filter.score(candidates[1:]), f"{filter.name} depends on the batch"


def _exif(orientation: int, size: tuple[int, int] | None = None) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    if size:
        exif[0x8769] = {0xA002: size[0], 0xA003: size[1]}
    return exif


def _long_exif(orientation: int) -> bytes:
    """The orientation tag with TIFF's 64-bit type LONG8."""
    return b"Exif\0\0II*\0" + struct.pack("<IHHHIIIQ", 8, 1, 0x0112, 16, 1, 26, 0, orientation)


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
        ({"exif": _exif(65535)}, (65535, "none", "invalid_value")),
        ({"exif": _long_exif(8)}, (8, "rotate_90", None)),
        ({"exif": _long_exif(2**63 + 5)}, (65535, "none", "invalid_value")),
        ({"exif": _long_exif(2**16)}, (65535, "none", "invalid_value")),
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


def test_resolution_is_that_of_the_upright_image(picture, encoded):
    (row,) = RESOLUTION.score([candidate(encoded(picture(size=(90, 60)), exif=_exif(6)))])
    assert row == {"width": 60, "height": 90, "short_side": 60, "pixels": 5400, "aspect": 1.5}


def test_pixel_hash_sees_through_formats_but_not_through_alpha(picture, encoded):
    image = picture(size=(40, 30))
    opaque, faint = image.convert("RGBA"), image.convert("RGBA")
    faint.putalpha(254)
    files = [encoded(image), encoded(image, compress_level=1), encoded(image, "BMP"), encoded(opaque), encoded(faint)]
    rows = DUPLICATES.score(list(map(candidate, files)))
    assert len({row["pixels_sha256"] for row in rows[:4]}) == 1 and rows[0]["pixels_sha256"] != rows[4]["pixels_sha256"]
    assert len({row["bytes_sha256"] for row in rows}) == 5


def test_pixel_hash_depends_on_the_shape(encoded):
    files = [encoded(Image.new("RGB", size)) for size in ((40, 30), (30, 40))]
    wide, tall = DUPLICATES.score(map(candidate, files))
    assert wide["pixels_sha256"] != tall["pixels_sha256"]


def test_fingerprints_look_at_transparent_images_on_white(picture, encoded):
    image = picture(size=(64, 64)).convert("RGBA")
    image.paste((0, 0, 0, 0), (0, 0, 32, 64))
    rows = DUPLICATES.score(candidate(encoded(one)) for one in (image, over_white(image)))
    names = ("phash", "dhash", "thumbnail")
    assert [rows[0][name] for name in names] == [rows[1][name] for name in names]


def noise(deviation: float = 50, size: int = 256) -> Image.Image:
    levels = np.random.default_rng(0).normal(128, deviation, (size, size))
    return Image.fromarray(levels.clip(0, 255).astype(np.uint8)).convert("RGB")


def page(lines: int) -> Image.Image:
    image = Image.new("RGB", (500, 600), "white")
    for line in range(lines):
        text = "Wizards brew strong coffee for jumping foxes"
        ImageDraw.Draw(image).text((40, 30 + 22 * line), text, fill="black", font=ImageFont.load_default(15))
    return image


def one(filter, data: bytes) -> dict:
    (row,) = filter.score([candidate(data)])
    return row


def empty_or_noise(data: bytes) -> str | None:
    row = {f"entropy.{name}": value for name, value in one(ENTROPY, data).items()}
    return RULES["entropy"](row, Thresholds())


def test_pages_survive_where_entropy_alone_would_drop_them(encoded):
    for lines in (1, 10, 25):
        assert one(ENTROPY, encoded(page(lines)))["bits"] < 2
        for data in (encoded(page(lines)), encoded(page(lines), "JPEG", quality=60)):
            assert empty_or_noise(data) is None


@pytest.mark.parametrize("colour", ["white", "black", "#c21f2b"])
def test_solid_images_are_empty(encoded, colour):
    image = Image.new("RGB", (256, 256), colour)
    assert empty_or_noise(encoded(image)) == empty_or_noise(encoded(image, "JPEG", quality=50)) == "empty"


def test_noise_is_noise_also_when_blurred_enlarged_faint_or_compressed(encoded):
    blurred = noise(size=512).filter(ImageFilter.GaussianBlur(1))
    for image in (noise(), noise(6), noise().resize((512, 512)), noise().resize((128, 128)), blurred):
        assert empty_or_noise(encoded(image)) == "noise"
    assert empty_or_noise(encoded(noise(), "JPEG", quality=20)) == "noise"


def test_stars_and_stripes_are_not_noise(encoded):
    random = np.random.default_rng(0)
    night = np.zeros((640, 640), np.uint8)
    for row, column in random.integers(0, 638, (300, 2)):
        night[row : row + 2, column : column + 2] = random.integers(80, 255)
    stripes = [np.tile((np.arange(640) // width % 2 * 255).astype(np.uint8), (640, 1)) for width in (2, 4)]
    for pixels in (night, *stripes):
        assert empty_or_noise(encoded(Image.fromarray(pixels).convert("RGB"), "JPEG", quality=92)) is None


def test_photographs_are_neither_empty_nor_noise(demo):
    images, summary, _, _ = demo
    for key in summary.clean:
        assert empty_or_noise((images / key).read_bytes()) is None, key


def test_clarity_falls_with_blur_and_noise_is_measured(picture, encoded):
    rng = np.random.default_rng(0)
    sharp = Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).resize((512, 512), Image.Resampling.NEAREST)
    clarities = [
        one(QUALITY, encoded(sharp.filter(ImageFilter.GaussianBlur(radius))))["clarity"] for radius in (0, 1, 3, 8)
    ]
    assert clarities == sorted(clarities, reverse=True) and clarities[0] > 100 * clarities[2]
    smooth = np.asarray(picture(size=(300, 300)).convert("L"), np.float32) / 2 + 64
    for deviation in (4, 12):
        noisy = Image.fromarray((smooth + rng.normal(0, deviation, smooth.shape)).clip(0, 255).astype(np.uint8))
        assert one(QUALITY, encoded(noisy))["noise"] == pytest.approx(deviation, rel=0.1)


def test_exposure(encoded):
    for level, dark, bright in ((0, 1, 0), (128, 0, 0), (255, 0, 1)):
        row = one(QUALITY, encoded(Image.new("L", (20, 20), level)))
        assert (row["brightness"], row["dark"], row["bright"]) == (round(level / 255, 4), dark, bright)


@pytest.mark.parametrize("quality", [10, 30, 50, 75, 90, 95])
def test_jpeg_quality_is_read_from_the_tables(picture, encoded, quality):
    row = one(COMPRESSION, encoded(picture(), "JPEG", quality=quality))
    assert row["jpeg_quality"] == pytest.approx(quality, abs=1)


def test_other_formats_have_no_jpeg_quality(picture, encoded):
    data = encoded(picture(size=(40, 30)))
    assert one(COMPRESSION, data) == {
        "jpeg_quality": None,
        "lossless": True,
        "bits_per_pixel": round(8 * len(data) / 1200, 4),
    }


@pytest.mark.parametrize(
    ("format", "options", "lossless"),
    [
        ("WEBP", {"quality": 80}, False),
        ("WEBP", {"lossless": True}, True),
        ("WEBP", {"lossless": True, "icc_profile": b"p" * 333}, True),
        ("AVIF", {}, False),
        ("TIFF", {}, True),
        ("TIFF", {"compression": "jpeg"}, False),
        ("GIF", {}, True),
    ],
)
def test_lossless_files_are_told_from_lossy_ones(picture, encoded, format, options, lossless):
    assert one(COMPRESSION, encoded(picture(size=(40, 30)), format, **options))["lossless"] is lossless


def test_border_measures_bars_and_frames_and_nothing_else(picture, encoded):
    framed = Image.new("RGB", (400, 300), "black")
    framed.paste(picture(size=(400, 200)), (0, 50))
    row = one(BORDER, encoded(framed, "JPEG", quality=90))
    assert row["bars"] == 1 and row["area"] == pytest.approx(1 / 3, abs=0.02) and row["left"] == 0
    frame = Image.new("RGB", (300, 300), "white")
    frame.paste(picture(size=(240, 240)), (30, 30))
    row = one(BORDER, encoded(frame))
    assert row["bars"] == 2 and row["area"] == pytest.approx(1 - 0.8**2, abs=0.02)
    for image in (picture(), Image.new("RGB", (64, 64), "white")):
        assert one(BORDER, encoded(image))["bars"] == 0


def test_special_tokens_in_captions_are_detected():
    ordinary = ("<b>bold</b>, a < b |> c", "<|no_token|>", "im_end")
    tokens = [token for token, _ in SPECIAL_TOKENS]
    captions = tuple(Caption(f"a cat {text} here") for text in (*tokens, *ordinary))
    nothing = UndecodableImage("empty", "0 bytes")
    (row,) = CAPTION_LENGTH.score([Candidate(Record("key", b"", captions, "test"), None, nothing)])
    first = build_qwen_tokenizer().convert_tokens_to_ids(tokens[0])
    ids = build_qwen_tokenizer()([caption.text for caption in captions]).input_ids
    assert row["reserved"] == [max(own) >= first for own in ids] == [True] * len(tokens) + [False] * len(ordinary)


def test_caption_length_counts_what_qwen_counts_and_finds_refusals():
    texts = (
        "Hello, world!",
        "I'm sorry, I can't describe this.",
        "一只红色的狐狸",
        "z" * 40,
        "so on and " * 200,
        "a cat <|image_pad|> here",
    )
    record = Record("key", b"", tuple(map(Caption, texts)), "test")
    (row,) = CAPTION_LENGTH.score([Candidate(record, None, UndecodableImage("empty", "0 bytes"))])
    assert row["tokens"][0] == 4 and row["tokens"][2] <= 7 and row["tokens"][4] >= 600
    assert row["refusal"] == [False, True, False, False, False, False]
    assert row["longest_run"][3] == 40 and row["longest_run"][0] == 2
    (instruction,) = INSTRUCTION_TEXT.score([Candidate(record, None, UndecodableImage("empty", "0 bytes"))])
    named = {f"caption_length.{name}": value for name, value in row.items()}
    named |= {f"instruction.{name}": value for name, value in instruction.items()} | {
        "description.conditions": 0,
        "description.kinds": ["general"] * len(texts),
        "alignment.unrelated": [False] * len(texts),
    }
    assert [reason for reason in caption_reasons(named, Thresholds())] == [
        *(None, "refusal", None, "repeats_itself", "repeats_itself", "reserved_token")
    ]


def test_nsfw_finds_ordinary_images_safe_and_an_edit_as_unsafe_as_its_worst_image(demo):
    images, summary, _, _ = demo
    decoded = [decode_image((images / key).read_bytes()) for key in summary.clean[:6]]
    record = Record("key", b"", (Caption("x"),), "test")
    scores = [row["score"] for row in NSFW.score([Candidate(record, one, None) for one in decoded])]
    assert max(scores) < 0.5 and len(set(scores)) > 1
    edit = Candidate(record, decoded[0], None, tuple(decoded[1:]))
    assert NSFW.score([edit]) == [{"score": max(scores)}]
