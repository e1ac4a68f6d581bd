"""Fixed prompts and edits of a config, drawn during training: checked early, and encoded once before training."""

import functools
import operator
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh
from jaxtyping import UInt8
from PIL import Image

from data_pipeline.buckets import PATCH
from data_pipeline.decoding.images import read_image
from data_pipeline.demo.dataset import package_folder
from data_pipeline.loading.mixture import layout_of
from data_pipeline.samples.cache import Largest
from data_pipeline.samples.schema import Sample, Text
from qi2_jax import sharding
from qi2_jax.inference.encoders import Encoders
from qi2_jax.inference.sizes import check_size
from qi2_jax.interop import components
from qi2_jax.pixels import over_white
from qi2_jax.sequence import Layout
from qi2_jax.tasks.transformer.samples_config import Samples
from qi2_jax.text.prompts import condition_size, resize_condition

EMPTY = ""  # negative prompt of guidance
PACKAGED = "scikit-image:"  # prefix for an image that comes with scikit-image


class Panel(NamedTuple):
    """Samples that are drawn as one grid.

    Attributes:
      layout: layout that fits every sample, with its text or with the empty prompt.
      samples: samples to draw. Only the size of the target latents is used.
      empty: empty prompt without condition images.
    """

    layout: Layout
    samples: Sequence[Sample]
    empty: Text


def check_images(config: Samples, side: int) -> None:
    """Checks that the condition images of a stage's `samples.edits` can be read, if any images are generated.

    Args:
      config: group `samples` of the stage.
      side: side of the square whose area the images get, in pixels.

    Raises:
      ValueError: naming the edit whose image cannot be read.
    """
    for place, (_, *paths) in enumerate(config.edits if config.every else ()):
        for path in paths:
            try:
                _condition(path, side)
            except ValueError as error:
                raise ValueError(f"samples.edits[{place}]: {error}") from error


def _condition(path: str, side: int) -> Image.Image:
    """A condition image as `qi2 edit --resolution SIDE` reads it, from a file or from `scikit-image:NAME.png`.

    Raises:
      ValueError: naming the path, if it cannot be read or resized.
    """
    image = read_image(_packaged(path) if path.startswith(PACKAGED) else pathlib.Path(path))
    try:
        check_size(*condition_size(*image.size, side))
    except ValueError as error:
        raise ValueError(f"image {path}: {error}") from None
    return resize_condition(image, side)


def _packaged(path: str) -> pathlib.Path:
    """The path of an image that is installed with scikit-image. Raises a ValueError if there is no such image."""
    try:
        folder = package_folder("skimage") / "data"
    except ImportError as error:
        raise ValueError(f"image {path}: {error}; or leave samples.edits empty") from None
    names = sorted(file.name for file in folder.glob("*") if file.suffix in (".png", ".jpg"))
    name = path.removeprefix(PACKAGED)
    if name not in names:
        raise ValueError(f"image {path} does not come with scikit-image, which has {', '.join(names)}")
    return folder / name


def encode(config: Samples, side: int, model: pathlib.Path, mesh: Mesh, dtype: Any) -> dict[str, Panel]:
    """Encodes `samples.prompts` and `samples.edits` of a stage.

    Both encoders are loaded onto the devices of this process and released again, so call this before training fills the
    memory. Every process encodes everything by itself.

    Args:
      config: group `samples` with `every`, `prompts` and `edits`. With `every` of 0 nothing is drawn.
      side: side of the square whose area the images get, in pixels.
      model: model folder of the run.
      mesh: devices of the run.
      dtype: dtype of the encoders, the one in which the training samples were encoded.

    Returns:
      Panels by the names of their grids: `prompts` with square images, and `edits` with images as large as the last
      condition image. Where edits have different numbers K of condition images, each number gets a grid `edits-K`.

    Raises:
      ValueError: if the folder lacks an encoder, and as `check_images`.
    """
    if not config.every or not (config.prompts or config.edits):
        return {}
    if missing := [name for name in ("text_encoder", "processor", "vae") if not (model / name).is_dir()]:
        raise ValueError(
            f"{model} lacks {missing}, which samples.prompts and samples.edits need; name the encoders' folder with "
            "--model, or draw neither with transformer.samples.prompts=() transformer.samples.edits=()"
        )
    # Sharded, not replicated: the condition encoder alone would fill a small chip.
    local = sharding.make_mesh(sharding.MeshShape(fsdp=len(mesh.local_devices)), mesh.local_devices)
    encoders = Encoders(model, local, dtype, local.size)
    channels = components.read_config(model / "vae", "vae").latent_channels

    def target(width: int, height: int) -> np.ndarray:
        return np.zeros((height // encoders.factor, width // encoders.factor, channels), np.float32)

    *texts, empty = encoders.texts([*config.prompts, EMPTY], [()] * (len(config.prompts) + 1))
    panels = {}
    if texts:
        panels["prompts"] = _panel(
            [Sample(target(*condition_size(side, side, side)), (text,)) for text in texts], empty
        )
    counts = sorted({len(edit) - 1 for edit in config.edits})
    for count in counts:
        edits = [edit for edit in config.edits if len(edit) - 1 == count]
        panels["edits" if len(counts) == 1 else f"edits-{count}"] = _edits(edits, encoders, side, empty)
    return panels


def _edits(edits: Sequence[Sequence[str]], encoders: Encoders, side: int, empty: Text) -> Panel:
    """A panel of edits that all have the same number of condition images."""
    images = [[_pixels(_condition(path, side), encoders.channels) for path in paths] for _, *paths in edits]
    patches = max(image.shape[0] * image.shape[1] for conditions in images for image in conditions) // PATCH**2
    texts = encoders.texts([text for text, *_ in edits], images, patches)
    empties = encoders.texts([EMPTY] * len(edits), images, patches)
    latents = [encoders.latents(conditions) for conditions in images]
    samples = [
        Sample(np.zeros_like(conditions[-1]), (text,), tuple(conditions), unconditional)
        for text, conditions, unconditional in zip(texts, latents, empties, strict=True)
    ]
    return _panel(samples, empty)


def _pixels(image: Image.Image, channels: int) -> UInt8[np.ndarray, "H W c"]:
    return np.asarray(image if channels == 4 else over_white(image))


def _panel(samples: Sequence[Sample], empty: Text) -> Panel:
    largest = functools.reduce(operator.or_, map(Largest.of, samples))
    return Panel(layout_of(largest, empty.lengths), samples, empty)
