"""Inputs of an evaluation: images in two categories, of which one image is broken, and small weights of LPIPS."""

import pathlib

import numpy as np
from PIL import Image
from safetensors.numpy import save_file

from qi2_jax.interop import lpips
from tests.interop.lpips_weights import published


def write_images(folder: pathlib.Path) -> pathlib.Path:
    """Three images, one that is too small, and one that is cut off; returns the folder."""
    rng = np.random.default_rng(0)
    for name, size in {"photo/a.png": (70, 40), "photo/b.png": (64, 32), "text/c.png": (64, 32)}.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8))
        coarse.resize(size, Image.Resampling.BICUBIC).save(path)
    Image.new("RGB", (15, 40)).save(folder / "photo/small.png")
    (folder / "photo/broken.png").write_bytes((folder / "photo/a.png").read_bytes()[:200])
    return folder


def write_lpips(folder: pathlib.Path) -> pathlib.Path:
    """The folder of LPIPS with random weights."""
    save_file(published(), folder / "torch.safetensors")
    lpips.convert(folder / "torch.safetensors", folder / "lpips")
    return folder / "lpips"
