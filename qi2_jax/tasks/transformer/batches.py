"""Completes the loader's batches for the transformer.

The frozen encoders compute what the samples lack: latents ahead of the step, on the devices of this process, and text
features within the step, on the whole mesh.
"""

import dataclasses
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from data_pipeline.buckets import Bucket
from data_pipeline.loading.batch import Batch, collate
from data_pipeline.samples.cache import Cache
from data_pipeline.samples.schema import NOTHING, TEXT_AND_IMAGES, Sample
from qi2_jax import sharding
from qi2_jax.inference import encoders, online
from qi2_jax.interop import components
from qi2_jax.sequence import Layout
from qi2_jax.tasks import devices
from qi2_jax.tasks.transformer.config import TransformerConfig
from qi2_jax.text.prompts import PromptProcessor

AHEAD = 2  # batches that are completed while the devices compute earlier ones


class Inputs:
    """Completes batches, whatever the samples contain.

    Args:
      config: config of the transformer stage.
      samples: encoded samples, which name what is computed online.
      model: folder with the encoders that made the samples.
      mesh: devices of the run.

    Attributes:
      text_encoder: frozen text encoder for the compiled program, see `complete`; None if features are cached.

    Raises:
      ValueError: if an encoder that is needed is missing.
    """

    text_encoder: Any = None
    _images: encoders.ImageEncoder | None = None

    def __init__(self, config: TransformerConfig, samples: Cache, model: pathlib.Path, mesh: Mesh):
        if samples.online == NOTHING:
            return
        needed = ("text_encoder", "vae") if samples.online == TEXT_AND_IMAGES else ("text_encoder",)
        if missing := [name for name in needed if not (model / name).is_dir()]:
            raise ValueError(
                f"{samples.folder} was encoded with encode.online={samples.online}, but {model} lacks {missing}; name "
                "the encoders' folder with --model"
            )
        dtype = devices.encoder_dtype(samples.fingerprint)
        self.text_encoder = encoders.load(model, "text_encoder", mesh, dtype)
        self._processor = PromptProcessor.from_folder(
            model / "processor", components.read_config(model / "text_encoder", "text_encoder")
        )
        self._kernel = sharding.Attention(mesh, config.execution.kernel)
        if samples.online == TEXT_AND_IMAGES:
            # One image per device wastes little padding. The mesh is process-local, so processes may encode different
            # sizes concurrently.
            local = sharding.make_mesh(sharding.MeshShape(data=len(mesh.local_devices)), mesh.local_devices)
            self._images = encoders.ImageEncoder.from_folder(model, local, dtype, local.size)

    def compile(self, buckets: Iterable[Bucket]) -> None:
        """Compiles the encoder for images of these sizes, so that no step waits for it."""
        if self._images is not None:
            channels = self._images.vae.config.in_channels
            self._images.latents([np.zeros((size.height, size.width, channels), np.uint8) for size in buckets])

    def with_latents(self, samples: Sequence[Sample]) -> list[Sample]:
        """The samples, with latents in place of the pixels that some of them hold."""
        if samples[0].target_pixels is None:
            return list(samples)
        assert self._images is not None
        pixels: list[Any] = [image for sample in samples for image in (sample.target_pixels, *sample.condition_pixels)]
        latents = iter(self._images.latents(pixels))
        return [
            dataclasses.replace(
                sample,
                latents=next(latents),
                conditions=tuple(next(latents) for _ in sample.condition_pixels),
                target_pixels=None,
            )
            for sample in samples
        ]

    def latents(self, sample: Sample) -> list[Float[np.ndarray, "_ _ C"]]:
        """Latents of the target and of the condition images of a sample."""
        (sample,) = self.with_latents([sample])
        return [sample.latents, *sample.conditions]

    def complete_on_host(self, layout: Layout, batch: Batch) -> Batch:
        """A batch with latents, and with prompts for the text encoder where it lacks features, as host arrays."""
        if not batch.samples:
            return batch
        prompts = None
        if not batch.cond.text_BTE.shape[-1]:
            prompts = online.prompt_rows(self._processor, layout, batch.samples)
        batch = collate(layout, self.with_latents(batch.samples))
        return batch._replace(prompts=prompts, samples=())

    def complete(self, frozen: Any, layout: Layout, batch: Batch) -> Batch:
        """A batch with text features, inside the compiled program. `frozen` has the encoder as `text_encoder`."""
        if batch.prompts is None:
            return batch
        features = online.text_features(frozen.text_encoder, batch.prompts, kernel=self._kernel)
        return batch._replace(cond=batch.cond._replace(text_BTE=features), prompts=None)
