"""Every test image of Pillow's source distribution: broken files, bombs, odd modes, and all orientations."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from data_pipeline.decoding.images import MAX_PIXELS
from tests.pillow_source import require_pillow_source

# Grey of 12 bits, which Pillow does not scale, and the transparent colour of 16-bit grey (test_depths).
PILLOW_LOSES = ("12bit.cropped.tif", "i_trns.png")


@pytest.fixture(scope="module")
def outcomes() -> dict[str, dict]:
    """Name -> line of `decode_all`, which must handle all images within two minutes and a gigabyte."""
    command = [sys.executable, "-m", "tests.data_pipeline.decoding.decode_all", str(require_pillow_source())]
    done = subprocess.run(command, cwd=Path(__file__).parents[3], capture_output=True, text=True, timeout=120)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, f"died at {lines[-1:]}: {done.stderr[-500:]}"
    assert lines.pop()["peak_bytes"] < 1 << 30
    return {line["name"]: line for line in lines if "name" in line}


def test_each_is_decoded_as_by_pillow_or_refused_with_its_reason(outcomes):
    assert len(outcomes) > 1000
    for name, found in outcomes.items():
        ours, plain = found["ours"], found["plain"]
        assert found["preview_first"] == ours, name
        if ours["reason"] is None and "error" in plain:
            assert ours["colour"] == "ignored", name  # Pillow refuses PNG files with a damaged profile
        elif ours["reason"] is None:
            expected = plain["managed"] if ours["colour"] == "converted" else plain
            assert name in PILLOW_LOSES or ours["pixels"] == expected[ours["mode"]], name
            assert ours["size"] == plain["size"], name
            assert ours["format"] == ("JPEG" if plain["format"] == "MPO" else plain["format"]), name
        elif ours["reason"] == "unknown_format":
            assert plain == {"error": None}, name
        elif ours["reason"] == "too_many_pixels":
            width, height = plain["size"]
            assert ours["detail"] == f"{width} x {height} of {MAX_PIXELS:,} allowed", name
        elif ours["reason"] == "unsupported_mode":
            assert ours["detail"] == plain["mode"], name
        else:
            assert ours["detail"].startswith(f"{plain['error']}: "), name


def test_what_is_refused(outcomes):
    reasons = Counter(found["ours"]["reason"] for found in outcomes.values())
    assert reasons[None] > 650 and reasons["undecodable"] > 10 and reasons["unsupported_mode"] >= 5, reasons
    colours = Counter(found["ours"]["colour"] for found in outcomes.values() if found["ours"]["reason"] is None)
    assert colours["converted"] >= 5 and colours["srgb"] >= 15 and colours["ignored"] >= 1, colours
    assert reasons["too_many_pixels"] >= 2 and "empty" not in reasons, reasons
    others = Counter(found["any_format"] for found in outcomes.values() if "any_format" in found)
    known = {found["ours"]["format"] for found in outcomes.values() if found["ours"]["reason"] is None}
    assert known == {"JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF"}
    assert not known & set(others) and {"TGA", "DDS", "PSD", "PPM", "JPEG2000", "ICO"} <= set(others), others


def test_orientations_are_exact(outcomes):
    names = [name for name in outcomes if "orientation" in name and outcomes[name]["ours"]["reason"] is None]
    assert {f"hopper_orientation_{tag}.{kind}" for tag in range(2, 9) for kind in ("jpg", "webp")} <= set(names)
    for name in names:  # the first test compares their pixels with those of exif_transpose
        assert outcomes[name]["ours"]["size"] == outcomes[name]["plain"]["size"]
    sizes = {tuple(outcomes[f"hopper_orientation_{tag}.jpg"]["ours"]["size"]) for tag in range(2, 9)}
    assert len(sizes) == 1
