"""The two frozen encoders on a mesh: pixels to latents, prompts with condition images to text features."""

import hashlib
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float, UInt8
from PIL import Image

from data_pipeline.samples import Text
from qi2_jax import prompts, sharding
from qi2_jax.interop import components
from qi2_jax.interop import weights as storage
from qi2_jax.interop.weights import STEM
from qi2_jax.models.qwen3_vl import EncoderInputs
from qi2_jax.pipeline import encode_images

LENGTH_MULTIPLE = 64  # tokens: prompts of similar length share compiled programs
AREA = 256 * 256  # pixels of the images of which `batch_size` are encoded at once
FEATURE_SIDE = 2  # latents per side of what one feature of the encoder sees


def digests(model: pathlib.Path) -> dict[str, str]:
    """What samples depend on in a model folder: both encoders and the prompts' processor, by their bytes."""
    names = (f"{STEM}.safetensors", "config.json")
    parts = {part: [model / part / name for name in names] for part in ("vae", "text_encoder")}
    parts["processor"] = sorted(path for path in (model / "processor").iterdir() if path.is_file())
    return {part: _digest(*paths) for part, paths in parts.items()}


def _digest(*paths: pathlib.Path) -> str:
    total = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


class Encoders:
    """Autoencoder and condition encoder of a model folder.

    Args:
      model: an imported folder, or that of a run.
      mesh: devices of this process.
      dtype: of weights and activations; text features are kept in it, latents in fp32.
      batch_size: prompts, or images of 256 x 256 pixels, at once; of larger images fewer. The mesh's data axes must
        divide it.
      online: texts are only counted: their features have no width, and training computes them.

    Raises:
      ValueError: if the batch cannot be split over the mesh.
    """

    def __init__(self, model: pathlib.Path, mesh: Mesh, dtype: Any, batch_size: int, online: bool = False):
        sharding.own_rows(mesh, batch_size)
        self.mesh, self.dtype, self.batch_size, self.online = mesh, dtype, batch_size, online
        self.vae = load(model, "vae", mesh, dtype)
        self.encoder = None if online else load(model, "text_encoder", mesh, dtype)
        config = components.read_config(model / "text_encoder", "text_encoder")
        self.processor = prompts.PromptProcessor.from_folder(model / "processor", config)
        self._parts = math.prod(mesh.shape[axis] for axis in sharding.RULES["batch"])
        self.factor, self.channels = self.vae.config.factor, self.vae.config.in_channels

    def images_at_once(self, width: int, height: int) -> int:
        """How many images of a size are encoded together: as many pixels as `batch_size` of the smallest area have."""
        count = self.batch_size * AREA // max(AREA, width * height)
        return max(self._parts, count // self._parts * self._parts)

    def latents(self, images: Sequence[UInt8[np.ndarray, "H W c"]]) -> list[Float[np.ndarray, "h w C"]]:
        """Normalised latents, in fp32, of pictures of one size."""
        found: list[np.ndarray] = []
        size = self.images_at_once(images[0].shape[1], images[0].shape[0])
        for start in range(0, len(images), size):
            part = images[start : start + size]
            filled = np.stack([*part, *[part[0]] * (size - len(part))])
            pixels = sharding.put_batch(self.mesh, filled.astype(np.float32) / 127.5 - 1, size)
            found += list(np.asarray(encode_images(self.vae, pixels, self.dtype))[: len(part)])
        return found

    def texts(
        self, texts: Sequence[str], images: Sequence[Sequence[UInt8[np.ndarray, "H W c"]]], max_patches: int = 0
    ) -> list[Text]:
        """Features of prompts, each with its condition images, of which all have the same number.

        Args:
          max_patches: of 16 x 16 pixels in the largest condition image of all calls.

        Raises:
          ValueError: if the processor's limits would resize a condition image again.
        """
        found: list[Text] = []
        for start in range(0, len(texts), self.batch_size):
            part = slice(start, start + self.batch_size)
            found += self._texts(texts[part], images[part], max_patches)
        return found

    def _texts(self, texts, images, max_patches) -> list[Text]:
        missing = self.batch_size - len(texts)
        pictures = [[Image.fromarray(pixels) for pixels in own] for own in images]
        count = len(images[0])
        batch = self.processor(
            [*texts, *texts[:1] * missing],
            [*pictures, *pictures[:1] * missing],
            multiple=LENGTH_MULTIPLE,
            enlarge=False,
            patch_count=max_patches if count else None,
        )
        for own, segments in zip(images, batch.segments, strict=False):
            for pixels, span in zip(own, segments.images, strict=True):
                expected = pixels.shape[0] * pixels.shape[1] // (FEATURE_SIDE * self.factor) ** 2
                if len(span) != expected:
                    raise ValueError(
                        f"the encoder sees {len(span)} features of a condition image of {pixels.shape[1]} x "
                        f"{pixels.shape[0]} pixels, not {expected}: its processor resized it again, whose limits are "
                        f"{self.processor.image_processor.size}"
                    )
        if self.encoder is None:
            return [
                Text(np.zeros((sum(map(len, segments.text)), 0), np.float32), tuple(map(len, segments.text)), text)
                for text, segments in zip(texts, batch.segments, strict=False)
            ]
        inputs = jax.tree.map(jax.device_put, batch.inputs, self._places(batch.inputs))
        rows = prompts.encode_prompts(self.encoder, prompts.PromptBatch(inputs, batch.dropped, batch.segments))
        return [
            Text(
                np.concatenate([row[span.start : span.stop] for span in segments.text]),
                tuple(map(len, segments.text)),
            )
            for row, segments in zip(rows[: len(texts)], batch.segments, strict=False)
        ]

    def _places(self, inputs: EncoderInputs) -> EncoderInputs:
        """Shardings of a batch: prompts over the data axes, and their images likewise."""
        axes = sharding.RULES["batch"]
        split = NamedSharding(self.mesh, PartitionSpec(axes))
        places = jax.tree.map(lambda _: split, inputs)
        return EncoderInputs(
            places.input_ids, places.valid, NamedSharding(self.mesh, PartitionSpec(None, axes)), places.vision
        )


def load(model: pathlib.Path, name: str, mesh: Mesh, dtype: Any = None) -> Any:
    """Loads one component of a model folder onto a mesh."""
    component = components.COMPONENTS[name]
    config = components.read_config(model / name, name)
    like = component.abstract(config)
    weights, _ = storage.of_ours(model / name, component.expected(config))
    return storage.load(weights, like, sharding.shardings(like, mesh), dtype)
