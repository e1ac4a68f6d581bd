"""Decodes the test images of Pillow's source with our decoder and with plain Pillow, and prints a JSON line for each.

It runs in its own process, because a decoder may crash: `python decode_all.py pillow-12.3.0.tar.gz`.
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
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from data_pipeline.decoding import images
from data_pipeline.decoding.images import UndecodableImage, decode_image


def ours(data: bytes, preview_first: bool) -> dict:
    try:
        decoded = decode_image(data, preview_first=preview_first)
    except UndecodableImage as error:
        return {"reason": error.reason, "detail": error.detail}
    image = decoded.image
    found = {"format": decoded.format, "mode": image.mode, "size": decoded.size, "pixels": digest(image)}
    return {"reason": None, "colour": decoded.colour} | found


def plain(data: bytes) -> dict:
    """What a few lines of Pillow decode: pixels after `exif_transpose`, `managed` in sRGB, or the error."""
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
        if mode in ("I", "F", "LAB"):
            return found
        if profile := image.info.get("icc_profile"):
            found["managed"] = {kind: managed(upright, profile, kind) for kind in KINDS}
        return found | {kind: digest(upright.convert(kind)) for kind in KINDS}
    except UnidentifiedImageError:
        return {"error": None}
    except Exception as error:
        return {"error": type(error).__name__, "message": str(error)}


KINDS = ("RGB", "RGBA")


def managed(image: Image.Image, profile: bytes, kind: str) -> str | None:
    """Digest of the pixels in sRGB; None if the profile is not for RGB pixels."""
    try:
        space, flags = ImageCms.createProfile("sRGB"), ImageCms.Flags.BLACKPOINTCOMPENSATION
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        rgb = ImageCms.profileToProfile(image.convert("RGB"), source, space, outputMode="RGB", flags=flags)
    except (ImageCms.PyCMSError, OSError):
        return None
    if kind == "RGBA":
        rgb.putalpha(image.convert("RGBA").getchannel("A"))
    return digest(rgb)


def digest(image: Image.Image) -> str:
    return hashlib.sha256(image.tobytes()).hexdigest()


def any_format(data: bytes) -> str | None:
    """The format that Pillow finds when all of its decoders are allowed."""
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
    # getrusage would include the peak of the parent process.
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    print(json.dumps({"peak_bytes": int(peak[1]) * 1024}))


if __name__ == "__main__":
    main(sys.argv[1])
