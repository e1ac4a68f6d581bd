"""Embedded profiles are converted to sRGB by the formulas of their colour spaces, and hostile profiles are harmless."""

import hashlib
import itertools
import re
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from data_pipeline.decoding import colour
from data_pipeline.decoding.images import MIN_HALVED_SIDE, UndecodableImage, decode_image

SRGB_PRIMARIES = ((0.640, 0.330), (0.300, 0.600), (0.150, 0.060))
P3_PRIMARIES = ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060))
ADOBE_PRIMARIES = ((0.640, 0.330), (0.210, 0.710), (0.150, 0.060))
PROPHOTO_PRIMARIES = ((0.7347, 0.2653), (0.1596, 0.8404), (0.0366, 0.0001))
WHITE_D65 = (0.3127, 0.3290)
DATE_AND_MARK = (2026, 1, 1, 0, 0, 0, b"acsp")
BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
WHITE_D50 = np.array([0.96422, 1.0, 0.82521])


def xyz(x: float, y: float) -> np.ndarray:
    return np.array([x / y, 1, (1 - x - y) / y])


def to_xyz_d65(primaries) -> np.ndarray:
    matrix = np.array([xyz(*one) for one in primaries]).T
    return matrix * np.linalg.solve(matrix, xyz(*WHITE_D65))


def fixed(values) -> bytes:
    return b"".join(struct.pack(">i", round(float(value) * 65536)) for value in values)


def icc(device: bytes, space: bytes, connection: bytes, tags: dict[bytes, bytes]) -> bytes:
    """An ICC v2 profile with these tags and the required ones."""
    tags = {
        b"desc": b"desc" + bytes(4) + struct.pack(">I", 5) + b"test\0" + bytes(78),
        b"cprt": b"text" + bytes(4) + b"none\0",
        b"wtpt": b"XYZ " + bytes(4) + fixed(WHITE_D50),
    } | tags
    table, data, start = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
    for key, value in tags.items():
        table += key + struct.pack(">II", start + len(data), len(value))
        data += value + bytes(-len(value) % 4)
    size = 128 + len(table + data)
    head = struct.pack(">I4sI4s4s4s6H4s", size, b"test", 0x02400000, device, space, connection, *DATE_AND_MARK)
    return head.ljust(68, b"\0") + fixed(WHITE_D50) + bytes(48) + table + data


def profile(gamma: float, primaries=None) -> bytes:
    """A display profile: RGB with these primaries and white point D65, or grey."""
    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256))
    if primaries is None:
        return icc(b"mntr", b"GRAY", b"XYZ ", {b"kTRC": curve})
    adapt = np.linalg.inv(BRADFORD) @ np.diag((BRADFORD @ WHITE_D50) / (BRADFORD @ xyz(*WHITE_D65))) @ BRADFORD
    tags = {}
    for place, channel in enumerate((b"r", b"g", b"b")):
        tags[channel + b"XYZ"] = b"XYZ " + bytes(4) + fixed((adapt @ to_xyz_d65(primaries))[:, place])
        tags[channel + b"TRC"] = curve
    return icc(b"mntr", b"RGB ", b"XYZ ", tags)


def in_srgb(levels: np.ndarray, gamma: float, primaries) -> np.ndarray:
    """sRGB levels 0..255 according to the formulas of the colour spaces, clipped to the gamut of sRGB."""
    linear = (levels / 255.0) ** gamma @ (np.linalg.inv(to_xyz_d65(SRGB_PRIMARIES)) @ to_xyz_d65(primaries)).T
    linear = linear.clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


SPACES = {
    "Display P3": (2.2, P3_PRIMARIES),
    "Adobe RGB": (2.19921875, ADOBE_PRIMARIES),
    "ProPhoto": (1.8, PROPHOTO_PRIMARIES),
    "linear sRGB": (1.0, SRGB_PRIMARIES),
}


@pytest.fixture(scope="module")
def chart() -> Image.Image:
    """Large squares of muted colours, which lie within sRGB in every space of `SPACES`."""
    levels = np.random.default_rng(0).integers(110, 160, (6, 8, 3), np.uint8)
    return Image.fromarray(levels).resize((800, 600), Image.Resampling.NEAREST)


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "TIFF", "AVIF"])
def test_colours_are_those_of_the_formulas(chart, encoded, space, form):
    options = {"PNG": {}, "JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(form, {})
    options |= {"quality": 100, "subsampling": "4:4:4"} if form == "AVIF" else {}
    decoded = decode_image(encoded(chart, form, icc_profile=profile(*SPACES[space]), **options))
    assert decoded.colour == "converted"
    expected = in_srgb(np.asarray(chart, float), *SPACES[space])
    assert np.abs(expected - np.asarray(chart)).mean() > 2  # without conversion
    inner = np.s_[20::100, 20::100]
    tolerance = 2.5 if form in ("PNG", "WEBP", "TIFF") else 6
    assert np.abs(np.asarray(decoded.image, float) - expected)[inner].max() < tolerance


def test_the_fast_way_through_a_jpeg_agrees(chart, encoded):
    for mode, embedded in (("RGB", profile(*SPACES["Adobe RGB"])), ("L", profile(1.0))):
        data = encoded(chart.convert(mode), "JPEG", quality=95, icc_profile=embedded)
        first, whole = decode_image(data, preview_first=True), decode_image(data)
        assert first.half is not None and first.colour == whole.colour == "converted" and chart.width >= MIN_HALVED_SIDE
        for name in ("preview", "preview_grey", "grey", "image"):
            one, other = (np.asarray(getattr(decoded, name), float) for decoded in (first, whole))
            assert one.shape == other.shape and np.abs(one - other).mean() < 0.7, name


def test_alpha_and_palettes_are_converted_too(chart, encoded):
    small = chart.resize((8, 6), Image.Resampling.NEAREST)
    faint = small.convert("RGBA")
    faint.putalpha(100)
    embedded = profile(*SPACES["Display P3"])
    plain, alpha, palette = (
        decode_image(encoded(image, icc_profile=embedded)) for image in (small, faint, small.quantize(64))
    )
    assert alpha.image.mode == "RGBA" and alpha.image.getchannel("A").getextrema() == (100, 100)
    assert alpha.image.convert("RGB").tobytes() == plain.image.tobytes() == palette.image.tobytes()


@pytest.mark.parametrize("mode", ["L", "LA", "I;16", "1"])
def test_grey_of_any_depth_follows_its_profile(encoded, mode):
    ramp = np.tile(np.arange(256, dtype=np.uint8), (4, 1))
    image = Image.fromarray(ramp.astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(ramp).convert(mode)
    decoded = decode_image(encoded(image, icc_profile=profile(1.0)))
    assert decoded.colour == "converted"
    stored = np.asarray(image.convert("L") if mode != "I;16" else Image.fromarray(ramp), float)
    expected = in_srgb(np.repeat(stored[..., None], 3, -1), 1.0, SRGB_PRIMARIES)
    found = np.asarray(decoded.image, float)
    assert np.abs(found - expected).max() <= 2.5
    assert (found[..., 0] == found[..., 1]).all() and (found[..., 0] == found[..., 2]).all()


def test_shadows_of_linear_16_bit_grey_keep_their_steps(encoded):
    levels = np.tile(np.arange(0, 2560, 10, dtype=np.uint16), (4, 1))  # ten of 256 levels
    decoded = decode_image(encoded(Image.fromarray(levels), icc_profile=profile(1.0)))
    assert len(np.unique(np.asarray(decoded.image))) > 45


INKS = {
    (0, 0, 0, 0): (255, 255, 255),
    (1, 0, 0, 0): (0, 140, 190),
    (0, 1, 0, 0): (200, 30, 110),
    (0, 0, 1, 0): (250, 230, 20),
    (0, 0, 0, 1): (0, 0, 0),
}


def print_profile() -> bytes:
    """An ICC v2 printer profile: Lab values of all 16 combinations of four inks, those of INKS among them."""
    nodes = []
    for inks in itertools.product((0, 1), repeat=4):
        over = np.prod(
            [np.array(INKS[one]) / 255 for one, ink in zip(SOLID, inks, strict=True) if ink] or [1.0], axis=0
        )
        srgb = np.array(INKS[inks]) / 255 if inks in INKS else np.broadcast_to(over, 3)
        linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
        adapt = np.linalg.inv(BRADFORD) @ np.diag((BRADFORD @ WHITE_D50) / (BRADFORD @ xyz(*WHITE_D65))) @ BRADFORD
        relative = adapt @ to_xyz_d65(SRGB_PRIMARIES) @ linear / WHITE_D50
        x, y, z = np.where(relative > 0.008856, np.cbrt(relative), 7.787 * relative + 16 / 116)
        lab = (116 * y - 16) * 2.55, 500 * (x - y) + 128, 200 * (y - z) + 128
        nodes += [round(float(level)) for level in np.clip(lab, 0, 255)]
    identity = bytes(range(256))
    matrix = b"".join(struct.pack(">i", 65536 * (place % 4 == 0)) for place in range(9))
    table = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + matrix + 4 * identity + bytes(nodes) + 3 * identity
    return icc(b"prtr", b"CMYK", b"Lab ", {b"A2B0": table})


SOLID = ((1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1))


def test_print_files_are_converted(encoded):
    for inks, expected in INKS.items():
        cmyk = Image.new("CMYK", (800, 600), tuple(255 * ink for ink in inks))
        for form, options in (("JPEG", {"quality": 100}), ("TIFF", {})):
            decoded = decode_image(encoded(cmyk, form, icc_profile=print_profile(), **options), preview_first=True)
            assert decoded.colour == "converted"
            difference = np.abs(np.asarray(decoded.image, float) - expected).max()
            assert difference <= 6, (inks, decoded.image.getpixel((0, 0)))


def test_srgb_and_untagged_pixels_stay_as_they_are(picture, encoded):
    image = picture(size=(MIN_HALVED_SIDE, 300))
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for form in ("PNG", "JPEG"):
        untagged, tagged = (decode_image(encoded(image, form, **one)) for one in ({}, {"icc_profile": srgb}))
        assert (untagged.colour, tagged.colour) == ("untagged", "srgb")
        assert untagged.image.tobytes() == tagged.image.tobytes()
        assert untagged.grey.tobytes() == tagged.grey.tobytes()


def hostile() -> dict[str, bytes]:
    good = profile(*SPACES["Display P3"])
    black = re.sub(rb"(XYZ \0{4})[\0-\xff]{12}", rb"\1" + bytes(12), good)
    return {
        "text": b"no profile",
        "cut": good[:200],
        "long": good + bytes(colour.MAX_PROFILE_BYTES),
        "of grey pixels": profile(1.0),
        "everything black": black,
        "lengths": good[:128] + struct.pack(">I", 0xFFFFFFFF) + good[132:],
        "of a link": good[:12] + b"link" + good[16:],
        "of fifteen inks": good[:16] + b"FCLR" + good[20:],
    }


@pytest.mark.parametrize("name", hostile())
def test_hostile_profiles_are_ignored(picture, encoded, name):
    image = picture(size=(40, 30))
    data = encoded(image, "WEBP", lossless=True, icc_profile=hostile()[name])
    decoded = decode_image(data)
    assert (decoded.colour, decoded.image.tobytes()) == ("ignored", image.tobytes())


@pytest.mark.parametrize(
    "content",
    {
        "method": b"name\0\x07" + zlib.compress(b"x"),
        "no name": b"",
        "too large": b"name\0\0" + zlib.compress(bytes(9 << 20)),
        "not compressed": b"name\0\0" + b"\xff" * 9,
    }.values(),
    ids=lambda content: str(len(content)),
)
def test_a_png_with_a_damaged_chunk_of_its_profile_is_decoded(picture, encoded, content):
    image = picture(size=(40, 30))
    data = encoded(image)
    chunk = struct.pack(">I", len(content)) + b"iCCP" + content + struct.pack(">I", zlib.crc32(b"iCCP" + content))
    decoded = decode_image(data[:33] + chunk + data[33:])
    assert decoded.image.tobytes() == image.tobytes()
    assert decoded.colour in ("ignored", "untagged")  # Pillow itself drops what it cannot decompress
    with pytest.raises(UndecodableImage):
        decode_image(data[:33] + chunk + data[33:60])


def test_damaged_profiles_never_raise(picture, encoded):
    rng, good = np.random.default_rng(0), profile(*SPACES["Adobe RGB"])
    image, outcomes = picture(size=(16, 12)), set()
    for _ in range(300):
        damaged = np.frombuffer(good, np.uint8).copy()
        damaged[rng.integers(0, len(damaged), 3)] = rng.integers(0, 256, 3)
        outcomes.add(decode_image(encoded(image, "WEBP", lossless=True, icc_profile=damaged.tobytes())).colour)
    assert outcomes <= colour.OUTCOMES.keys() and {"converted", "ignored"} <= outcomes


def test_equal_pixels_under_different_profiles_are_not_the_same_image(picture, encoded):
    from data_pipeline.filters.base import Candidate
    from data_pipeline.filters.duplicates import DUPLICATES
    from data_pipeline.records.schema import Caption, Record

    tags = ({}, {"icc_profile": profile(*SPACES["Adobe RGB"])}, {"icc_profile": profile(*SPACES["ProPhoto"])})
    for form in ("JPEG", "PNG"):
        files = [encoded(picture(), form, **tag) for tag in tags]
        rows = DUPLICATES.score([Candidate(Record("k", x, (Caption("x"),), "s"), decode_image(x), None) for x in files])
        assert len({row["pixels_sha256"] for row in rows}) == len({hashlib.sha256(x).digest() for x in files}) == 3


def png_with(data: bytes, chunks: dict[bytes, bytes]) -> bytes:
    added = b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks.items()
    )
    return data[:33] + added + data[33:]


P3_CHROMATICITY = struct.pack(">8I", 31270, 32900, 68000, 32000, 26500, 69000, 15000, 6000)


@pytest.mark.parametrize(
    ("chunks", "outcome"),
    [
        ({}, "untagged"),
        ({b"cICP": bytes((1, 13, 0, 1))}, "untagged"),
        ({b"gAMA": struct.pack(">I", 45455)}, "untagged"),
        ({b"sRGB": b"\0", b"gAMA": struct.pack(">I", 100000)}, "untagged"),
        ({b"cICP": bytes((12, 13, 0, 1))}, "unmanaged"),
        ({b"cICP": bytes((9, 16, 0, 1))}, "unmanaged"),
        ({b"gAMA": struct.pack(">I", 100000)}, "unmanaged"),
        ({b"gAMA": struct.pack(">I", 45455), b"cHRM": P3_CHROMATICITY}, "unmanaged"),
    ],
)
def test_png_chunks_of_other_colour_spaces_are_counted(picture, encoded, chunks, outcome):
    assert decode_image(png_with(encoded(picture(size=(40, 30))), chunks)).colour == outcome


def test_exif_and_nclx_of_other_colour_spaces_are_counted(picture, encoded):
    image = picture(size=(40, 30))
    for space, index, outcome in ((1, "R98", "untagged"), (2, "R98", "unmanaged"), (65535, "R03", "unmanaged")):
        exif = Image.Exif()
        exif[0x8769] = {0xA001: space, 0xA005: {1: index}}
        assert decode_image(encoded(image, "JPEG", exif=exif.tobytes())).colour == outcome
    avif = encoded(image, "AVIF")
    place = avif.index(b"colrnclx") + 8
    assert decode_image(avif).colour == "untagged"
    assert decode_image(avif[:place] + b"\0\x0c" + avif[place + 2 :]).colour == "unmanaged"
