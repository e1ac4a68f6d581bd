"""Depths of 1, 2, 4, 12 and 16 bits, and transparent colours at each of them."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from data_pipeline.decoding.images import decode_image


def png(levels: np.ndarray, bits: int, transparent: tuple[int, ...]) -> bytes:
    """A PNG of grey or RGB levels with `bits` bits each, and a transparent colour."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width = levels.shape[:2]
    if bits == 16:
        rows = [row.astype(">u2").tobytes() for row in levels]
    else:
        unpacked = np.unpackbits(levels.astype(np.uint8)[..., None], axis=-1)[..., -bits:]
        rows = [np.packbits(row.reshape(-1)).tobytes() for row in unpacked]
    header = struct.pack(">IIBBBBB", width, height, bits, 0 if len(transparent) == 1 else 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"tRNS", struct.pack(f">{len(transparent)}H", *transparent))
        + chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_the_transparent_grey_of_a_png_is_kept(bits):
    top = 2**bits - 1
    for transparent in {0, top // 3, top}:
        levels = np.resize([0, top // 3, top], (6, 9))
        image = decode_image(png(levels, bits, (transparent,))).image
        assert image.mode == "RGBA"
        np.testing.assert_array_equal(np.asarray(image)[..., 3], np.where(levels == transparent, 0, 255))
        np.testing.assert_array_equal(np.asarray(image)[..., 0], levels * 255 // top)


@pytest.mark.parametrize("bits", [8, 16])
def test_the_transparent_colour_of_a_png_is_kept(bits):
    unit = 257 if bits == 16 else 1
    levels = np.resize(np.array([[10, 20, 30], [10, 20, 31], [200, 3, 4]]) * unit, (4, 6, 3))
    image = decode_image(png(levels, bits, (10 * unit, 20 * unit, 30 * unit))).image
    assert image.mode == "RGBA"
    np.testing.assert_array_equal(np.asarray(image)[..., 3] == 0, (levels == levels[0, 0]).all(-1))


def test_grey_tiff_of_16_bits_in_both_orders_and_polarities(encoded):
    levels = np.linspace(0, 65535, 48, dtype=np.uint16).reshape(6, 8)
    upright = (levels >> 8).astype(np.uint8)
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[262] = 0  # PhotometricInterpretation: white is zero
    for data, expected in (
        (encoded(Image.fromarray(levels), "TIFF"), upright),
        (encoded(Image.fromarray(levels.astype(">u2")), "TIFF"), upright),
        (encoded(Image.fromarray(65535 - levels), "TIFF", tiffinfo=tags), upright),
    ):
        np.testing.assert_array_equal(np.asarray(decode_image(data).image)[..., 0], expected)


def test_grey_tiff_of_12_bits_is_not_black():
    """The file of 4 x 1 pixels is assembled here, since Pillow writes no 12 bits."""
    pixels = bytes([0x00, 0x08, 0x00, 0xFF, 0xF1, 0x00])  # 0, 0x800, 0xFFF, 0x100
    entries = [(256, 4), (257, 1), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (278, 1), (279, len(pixels))]
    directory = struct.pack("<H", len(entries))
    directory += b"".join(struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in entries) + bytes(4)
    data = struct.pack("<2sHI", b"II", 42, 8 + len(pixels)) + pixels + directory
    np.testing.assert_array_equal(np.asarray(decode_image(data).image)[0, :, 0], [0, 0x80, 0xFF, 0x10])
