"""The frozen encoders on a mesh: pixels to latents, and prompts with condition images to text features."""

import dataclasses
import functools
import logging
import pathlib
from collections.abc import Sequence
from typing import Any, Self

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float, UInt8
from PIL import Image

from data_pipeline.samples.schema import NOTHING, TEXT_AND_IMAGES, Text
from qi2_jax import sharding
from qi2_jax.inference import tiling
from qi2_jax.interop import components, stored_weights
from qi2_jax.interop.stored_weights import STEM
from qi2_jax.models.layers import AnyArray
from qi2_jax.models.qwen3_vl.inputs import EncoderInputs
from qi2_jax.models.vae import VAE
from qi2_jax.pixels import normalize
from qi2_jax.runtime import logs
from qi2_jax.runtime.digests import of_files
from qi2_jax.text import prompts

_log = logging.getLogger(__name__)

LENGTH_MULTIPLE = 64  # padding granularity in tokens: prompts of similar length share compiled programs
AREA = 256 * 256  # pixels; `batch_size` images of this area are encoded at once


def digests(model: pathlib.Path) -> dict[str, str]:
    """SHA-256 digests of the parts of a model folder that samples depend on: both encoders and the processor."""
    names = (f"{STEM}.safetensors", "config.json")
    parts = {part: [model / part / name for name in names] for part in ("vae", "text_encoder")}
    parts["processor"] = sorted(path for path in (model / "processor").iterdir() if path.is_file())
    return {part: of_files(paths) for part, paths in parts.items()}


class ImageEncoder:
    """The encoder half of an autoencoder.

    Args:
      vae: autoencoder on the devices of `mesh`; its decoder may be missing.
      mesh: devices of this process.
      dtype: dtype of the activations; latents are in fp32.
      batch_size: number of 256 x 256 images per batch, see `images_at_once`.
    """

    def __init__(self, vae: VAE, mesh: Mesh, dtype: Any, batch_size: int):
        self.vae, self.mesh, self.dtype, self.batch_size = vae, mesh, dtype, batch_size

    @classmethod
    def from_folder(cls, model: pathlib.Path, mesh: Mesh, dtype: Any, batch_size: int) -> Self:
        """The encoder of a model folder, with its weights in `dtype`."""
        return cls(encoder_half(load(model, "vae", mesh, dtype)), mesh, dtype, batch_size)

    def images_at_once(self, width: int, height: int) -> int:
        """See the function `images_at_once`."""
        return images_at_once(self.mesh, self.batch_size, width, height)

    def latents(self, images: Sequence[UInt8[np.ndarray, "_ _ c"]]) -> list[Float[np.ndarray, "_ _ C"]]:
        """Normalised latents of images. Images of one size are encoded together; each size has a program."""
        running: list[tuple[list[int], AnyArray]] = []
        for height, width in sorted({image.shape[:2] for image in images}):
            places = [place for place, image in enumerate(images) if image.shape[:2] == (height, width)]
            size = self.images_at_once(width, height)
            place = functools.partial(sharding.put_batch, self.mesh, batch_size=size)
            for start in range(0, len(places), size):
                batch = places[start : start + size]
                filled = np.stack([images[place] for place in batch + batch[:1] * (size - len(batch))])
                running.append((batch, tiling.encode(self.vae, normalize(filled), self.dtype, place=place)))
        # All batches are dispatched before the first result is awaited.
        found = {
            place: row for batch, latents in running for place, row in zip(batch, np.asarray(latents), strict=False)
        }
        return [found[place] for place in range(len(images))]


def encoder_half(vae: VAE) -> VAE:
    """The same autoencoder, from which the decoder is removed: most of the weights."""
    del vae.decoder, vae.post_quant_conv
    return vae


def images_at_once(mesh: Mesh, batch_size: int, width: int, height: int) -> int:
    """Number of images of a size per batch, whose total area is at most that of `batch_size` 256 x 256 images."""
    count, parts = batch_size * AREA // max(AREA, width * height), sharding.num_batch_shards(mesh)
    return max(parts, count // parts * parts)


def prompts_at_once(mesh: Mesh, batch_size: int, images: int, max_patches: int) -> int:
    """Number of prompts per batch, whose condition images have at most the area of `batch_size` 256 x 256 images.

    Args:
      mesh: devices of this process.
      batch_size: number of prompts without condition images.
      images: condition images of each prompt.
      max_patches: number of 16 x 16 patches in the largest condition image.
    """
    return images_at_once(mesh, batch_size, 16 * images, 16 * max_patches)


class Encoders:
    """Autoencoder and condition encoder of a model folder.

    Args:
      model: imported folder, or the model folder of a run.
      mesh: devices of this process.
      dtype: dtype of weights, activations and text features; latents are in fp32.
      batch_size: number of prompts, or of 256 x 256 images, per batch; a multiple of the size of the mesh's data axes.
        Prompts with large condition images have smaller batches, see `prompts_at_once`.
      online: what training computes itself, see `schema.ONLINE`. Only sizes are determined here: features have no
        width, and latents no channels.

    Raises:
      ValueError: if the batch cannot be split over the mesh.
    """

    def __init__(self, model: pathlib.Path, mesh: Mesh, dtype: Any, batch_size: int, online: str = NOTHING):
        sharding.local_rows(mesh, batch_size)
        self.mesh, self.batch_size, self.online = mesh, batch_size, online
        self.images = None if online == TEXT_AND_IMAGES else ImageEncoder.from_folder(model, mesh, dtype, batch_size)
        self.encoder = load(model, "text_encoder", mesh, dtype) if online == NOTHING else None
        config = components.read_config(model / "text_encoder", "text_encoder")
        self.processor = prompts.PromptProcessor.from_folder(model / "processor", config)
        vae = components.read_config(model / "vae", "vae")
        self.factor, self.channels = vae.factor, vae.in_channels

    def images_at_once(self, width: int, height: int) -> int:
        """See the function `images_at_once`."""
        return images_at_once(self.mesh, self.batch_size, width, height)

    def latents(self, images: Sequence[UInt8[np.ndarray, "_ _ c"]]) -> list[Float[np.ndarray, "_ _ C"]]:
        """Normalised latents of images of any sizes."""
        if self.images is None:
            grids = [(image.shape[0] // self.factor, image.shape[1] // self.factor) for image in images]
            return [np.zeros((*grid, 0), np.float32) for grid in grids]
        return self.images.latents(images)

    def texts(
        self, texts: Sequence[str], images: Sequence[Sequence[UInt8[np.ndarray, "_ _ c"]]], max_patches: int = 0
    ) -> list[Text]:
        """Features of prompts with their condition images; all prompts have the same number of images.

        Args:
          texts: prompts.
          images: pixels of each prompt's condition images, resized as `resize_condition` does.
          max_patches: number of 16 x 16 patches in the largest condition image of all calls.

        Raises:
          ValueError: as `PromptProcessor`.
        """
        found: list[Text] = []
        size = prompts_at_once(self.mesh, self.batch_size, len(images[0]), max_patches) if texts else 1
        for start in range(0, len(texts), size):
            part = slice(start, start + size)
            found += self._texts(texts[part], images[part], max_patches, size)
        return found

    def _texts(
        self, texts: Sequence[str], images: Sequence[Sequence[UInt8[np.ndarray, "_ _ c"]]], max_patches: int, size: int
    ) -> list[Text]:
        missing = size - len(texts)
        conditions = [[Image.fromarray(pixels) for pixels in each] for each in images]
        count = len(images[0])
        batch = self.processor(
            [*texts, *list(texts[:1]) * missing],
            [*conditions, *conditions[:1] * missing],
            multiple=LENGTH_MULTIPLE,
            enlarge=False,
            patch_count=max_patches if count else None,
        )
        if self.encoder is None:
            rows = [np.zeros((segments.length, 0), np.float32) for segments in batch.segments]
        else:
            inputs = jax.tree.map(jax.device_put, batch.inputs, places(self.mesh, batch.inputs))
            placed = dataclasses.replace(batch, inputs=inputs)
            rows = prompts.encode_prompts(self.encoder, placed, kernel=sharding.Attention(self.mesh))
        return [
            Text(row[segments.text_indices], segments.text_lengths, text)
            for row, text, segments in zip(rows, texts, batch.segments, strict=False)
        ]


def places(mesh: Mesh, inputs: EncoderInputs) -> EncoderInputs:
    """Shardings of a batch of prompts: prompts and images are split over the data axes."""
    split, axes = sharding.batch_sharding(mesh), sharding.RULES["batch"]
    found = jax.tree.map(lambda _: split, inputs)
    return dataclasses.replace(found, positions=NamedSharding(mesh, PartitionSpec(None, axes)))


def load(model: pathlib.Path, name: str, mesh: Mesh, dtype: Any = None) -> Any:
    """Loads a component of a model folder onto a mesh."""
    component = components.COMPONENTS[name]
    config = components.read_config(model / name, name)
    like = component.abstract(config)
    weights, _ = stored_weights.open_ours(model / name, component.expected(config))
    with logs.loading(_log, name, sum(leaf.size for leaf in jax.tree.leaves(like))):
        return stored_weights.load(weights, like, sharding.shardings(like, mesh), dtype)
