"""Decodes the test pictures of Pillow's source, by our decoder and by plain Pillow: a line of JSON for each.

A process of its own, because a decoder may crash: `python decode_all.py pillow-12.3.0.tar.gz`.
"""

import hashlib
import io
import json
import re
import sys
import tarfile
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from data_pipeline.decoding import images
from data_pipeline.decoding.images import UndecodableImage, decode_image


def ours(data: bytes, preview_first: bool) -> dict:
    try:
        decoded = decode_image(data, preview_first=preview_first)
    except UndecodableImage as error:
        return {"reason": error.reason, "detail": error.detail}
    image = decoded.image
    return {"reason": None, "format": decoded.format, "mode": image.mode, "size": decoded.size, "pixels": digest(image)}


def plain(data: bytes) -> dict:
    """What a few lines of Pillow make of a file: pixels after `exif_transpose`, or the error."""
    try:
        image = Image.open(io.BytesIO(data), formats=images.FORMATS)
        size = image.size
        if size[0] * size[1] > images.MAX_PIXELS:
            return {"size": size}
        image.load()
        form, mode = image.format, image.mode
        upright = ImageOps.exif_transpose(image)
        if mode.startswith("I;16"):
            upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
        found = {"format": form, "mode": mode, "size": upright.size}
        return found if mode in ("I", "F", "LAB") else found | {kind: digest(upright.convert(kind)) for kind in KINDS}
    except UnidentifiedImageError:
        return {"error": None}
    except Exception as error:
        return {"error": type(error).__name__, "message": str(error)}


KINDS = ("RGB", "RGBA")


def digest(image: Image.Image) -> str:
    return hashlib.sha256(image.tobytes()).hexdigest()


def any_format(data: bytes) -> str | None:
    """What Pillow takes a file for when all of its decoders may look at it."""
    try:
        return Image.open(io.BytesIO(data)).format
    except Exception:
        return None


def main(path: str) -> None:
    warnings.simplefilter("ignore")
    Image.MAX_IMAGE_PIXELS = None
    with tarfile.open(path) as archive:
        for member in archive:
            if member.isfile() and "/Tests/images/" in member.name:
                data = archive.extractfile(member).read()
                name = member.name.split("/Tests/images/")[1]
                print(json.dumps({"begin": name}), flush=True)
                found = {"ours": ours(data, False), "preview_first": ours(data, True), "plain": plain(data)}
                if found["ours"]["reason"] == "unknown_format":
                    found["any_format"] = any_format(data)
                print(json.dumps({"name": name} | found), flush=True)
    # Not by getrusage, which counts in the process that started this one.
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    print(json.dumps({"peak_bytes": int(peak[1]) * 1024}))


if __name__ == "__main__":
    main(sys.argv[1])
