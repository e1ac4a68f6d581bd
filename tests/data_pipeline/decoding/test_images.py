import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps

from data_pipeline.decoding import images
from data_pipeline.decoding.images import TRANSFORMS, UndecodableImage, decode_image
from qi2_jax.pixels import over_white


def _bomb(side: int) -> bytes:
    """A PNG whose header announces side x side pixels."""
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(b"\0")) + _chunk(b"IEND", b"")


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def test_reasons(picture, encoded):
    jpeg, png = encoded(picture(), "JPEG"), encoded(picture())
    cases = {
        b"": "empty",
        b"no image at all": "unknown_format",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n": "unknown_format",  # Pillow would start another program
        _bomb(65_000): "too_many_pixels",
        _bomb(1_000): "undecodable",
        jpeg[: len(jpeg) // 2]: "undecodable",
        jpeg[:-2]: "undecodable",
        png[: len(png) // 2]: "undecodable",
        encoded(Image.new("F", (9, 9)), "TIFF"): "unsupported_mode",
        encoded(Image.new("I", (9, 9)), "TIFF"): "unsupported_mode",
    }
    for data, reason in cases.items():
        with pytest.raises(UndecodableImage) as error:
            decode_image(data)
        assert error.value.reason == reason, error.value
    assert {*cases.values()} == {*images.REASONS}


@pytest.mark.parametrize(("max_pixels", "truncated"), [(1, True), (None, False)])
def test_global_switches_of_pillow_neither_matter_nor_change(picture, encoded, monkeypatch, max_pixels, truncated):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", max_pixels)
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", truncated)
    warnings.simplefilter("error")
    jpeg = encoded(picture(), "JPEG")
    assert decode_image(jpeg).image.size == (300, 280)
    for data in (jpeg[:-200], _bomb(65_000)):
        with pytest.raises(UndecodableImage):
            decode_image(data)
    assert (max_pixels, truncated) == (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES)


def test_random_damage_never_raises_anything_else(picture, encoded):
    rng = np.random.default_rng(0)
    files = [encoded(picture(size=(40, 30)), format) for format in images.FORMATS]
    outcomes = set()
    for data in files:
        for _ in range(60):
            damaged = np.frombuffer(data, np.uint8).copy()
            damaged[rng.integers(0, min(len(damaged), 200), 4)] = rng.integers(0, 256, 4)
            try:
                decode_image(damaged.tobytes())
                outcomes.add("decoded")
            except UndecodableImage as error:
                outcomes.add(error.reason)
    assert {"decoded", "unknown_format", "undecodable"} <= outcomes


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr", "I;16"])
def test_every_mode_becomes_rgb(picture, encoded, mode):
    source = picture(size=(40, 30))
    if mode == "I;16":
        grey = np.asarray(source.convert("L")).astype(np.uint16) << 8
        image, expected = Image.fromarray(grey), Image.fromarray((grey >> 8).astype(np.uint8)).convert("RGB")
    else:
        image = source.convert(mode)
        expected = image.convert("RGB")
    # Pillow 12 cannot read YCbCr that it wrote uncompressed. libtiff converts it to RGB with roundings of its own.
    decoded = decode_image(encoded(image, "TIFF", compression="tiff_lzw"))
    assert decoded.image.mode == "RGB"
    difference = np.abs(np.asarray(decoded.image, np.int16) - np.asarray(expected, np.int16)).max()
    assert difference <= (1 if mode == "YCbCr" else 0)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_alpha_is_kept_when_something_shines_through(encoded, mode):
    image = Image.new("RGBA", (8, 4), (200, 30, 30, 255))
    assert decode_image(encoded(image.convert(mode) if mode != "P" else image.quantize(4))).image.mode == "RGB"
    image.paste((0, 0, 0, 0), (0, 0, 4, 4))
    decoded = decode_image(encoded(image.convert(mode) if mode != "P" else image.quantize(4))).image
    assert decoded.mode == "RGBA"
    white = np.asarray(over_white(decoded))
    assert (white[:, :4] == 255).all() and (white[:, 4:] < 255).any(axis=-1).all()


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("tag", range(1, 9))
def test_orientation_is_applied_once(encoded, format, tag):
    image = Image.new("L", (32, 16), 0)
    image.paste(255, (0, 0, 8, 8))
    image = image.convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = tag
    options = {"quality": 95} if format == "JPEG" else {"lossless": True} if format == "WEBP" else {}
    decoded = decode_image(encoded(image, format, exif=exif, **options))
    tagged = image.copy()
    tagged.getexif()[0x0112] = tag
    expected = np.asarray(ImageOps.exif_transpose(tagged)).astype(int)
    assert decoded.image.size == expected.shape[1::-1] == ((16, 32) if tag >= 5 else (32, 16))
    assert abs(np.asarray(decoded.image) - expected).max() < 8
    assert decoded.orientation == (None if format == "TIFF" and tag > 1 else tag)
    assert set(TRANSFORMS) == set(range(2, 9))


def test_first_frame_of_an_animation(picture, encoded):
    frames = [picture(seed).quantize(16) for seed in (1, 2)]
    decoded = decode_image(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    np.testing.assert_array_equal(np.asarray(decoded.image), np.asarray(frames[0].convert("RGB")))
