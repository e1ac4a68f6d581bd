"""Prompts and edits that a config holds fixed, drawn while training: checked early, and encoded once before it."""

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
from qi2_jax.inference.pipeline import check_size
from qi2_jax.interop import components
from qi2_jax.pixels import over_white
from qi2_jax.sequence import Layout
from qi2_jax.tasks.transformer.samples_config import Samples
from qi2_jax.text.prompts import condition_size, resize_condition

EMPTY = ""  # what guidance leads away from
PACKAGED = "scikit-image:"  # before the name of a picture that the installed scikit-image brings


class Panel(NamedTuple):
    """Samples that are drawn as one grid.

    Attributes:
      layout: holds every sample, and the empty prompt in the place of its text.
      samples: of which the latents of the target may be empty and then only state its size.
      empty: the empty prompt without condition images.
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
    """A condition image as `qi2 edit --resolution SIDE` reads it, of a file or of `scikit-image:NAME.png`.

    Raises:
      ValueError: naming the path, if it cannot be read, or has no such size.
    """
    image = read_image(_packaged(path) if path.startswith(PACKAGED) else pathlib.Path(path))
    try:
        check_size(*condition_size(*image.size, side))
    except ValueError as error:
        raise ValueError(f"image {path}: {error}") from None
    return resize_condition(image, side)


def _packaged(path: str) -> pathlib.Path:
    """Where a picture of scikit-image lies. Raises a ValueError if it is none of those that are installed with it."""
    try:
        folder = package_folder("skimage") / "data"
    except ImportError as error:
        raise ValueError(f"image {path}: {error}; or let samples.edits be empty") from None
    names = sorted(own.name for own in folder.glob("*") if own.suffix in (".png", ".jpg"))
    name = path.removeprefix(PACKAGED)
    if name not in names:
        raise ValueError(f"image {path} is not one that scikit-image brings; these are there: {', '.join(names)}")
    return folder / name


def encode(config: Samples, side: int, model: pathlib.Path, mesh: Mesh, dtype: Any) -> dict[str, Panel]:
    """What is drawn of a stage's `samples.prompts` and `samples.edits`, by the names of the grids.

    Both encoders are loaded onto the devices of this process, and have left them when this returns: to be called before
    training fills the memory. Every process encodes everything, without the others.

    Args:
      config: `every`, `prompts`, `edits`; where `every` is 0 nothing is drawn.
      side: of the square whose area the pictures get, in pixels.
      model: the run's model folder.
      mesh: of the training.
      dtype: of the encoders, that in which the training's samples were encoded.

    Returns:
      `prompts` of squares; and `edits`, each as large as its last condition image, or `edits-K` of those with K
      condition images where their numbers differ.

    Raises:
      ValueError: if the folder lacks an encoder, or as `check`.
    """
    if not config.every or not (config.prompts or config.edits):
        return {}
    if missing := [name for name in ("text_encoder", "processor", "vae") if not (model / name).is_dir()]:
        raise ValueError(
            f"samples.prompts and samples.edits are to be drawn, but {model} lacks {missing}; name the encoders' "
            "folder with --model, or draw neither with transformer.samples.prompts=() transformer.samples.edits=()"
        )
    # Split, not copied: the condition encoder alone would fill a small chip.
    own = sharding.make_mesh(sharding.MeshShape(fsdp=len(mesh.local_devices)), mesh.local_devices)
    encoders = Encoders(model, own, dtype, own.size)
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
        pictures = [[_pixels(_condition(path, side), encoders.channels) for path in paths] for _, *paths in edits]
        patches = max(picture.shape[0] * picture.shape[1] for own in pictures for picture in own) // PATCH**2
        texts = encoders.texts([text for text, *_ in edits], pictures, patches)
        empties = encoders.texts([EMPTY] * len(edits), pictures, patches)
        latents = [encoders.latents(own) for own in pictures]
        panels["edits" if len(counts) == 1 else f"edits-{count}"] = _panel(
            [
                Sample(np.zeros_like(conditions[-1]), (text,), tuple(conditions), own)
                for text, conditions, own in zip(texts, latents, empties, strict=True)
            ],
            empty,
        )
    return panels


def _pixels(image: Image.Image, channels: int) -> UInt8[np.ndarray, "H W c"]:
    return np.asarray(image if channels == 4 else over_white(image))


def _panel(samples: Sequence[Sample], empty: Text) -> Panel:
    largest = functools.reduce(operator.or_, map(Largest.of, samples))
    return Panel(layout_of(largest, empty.lengths), samples, empty)
