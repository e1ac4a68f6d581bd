"""From rows of the loader to the transformer's batches. What the samples lack, the frozen encoders compute: latents
ahead of the step, on the devices of this process, and text features within it, on the whole mesh.
"""

import collections
import pathlib
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from data_pipeline.buckets import Bucket
from data_pipeline.loading.loader import Rows, place_latents
from data_pipeline.samples.cache import Cache
from data_pipeline.samples.schema import NOTHING, TEXT_AND_IMAGES, Sample
from qi2_jax import sharding
from qi2_jax.inference import encoders, online
from qi2_jax.interop import components
from qi2_jax.models.mmdit import Conditioning
from qi2_jax.sequence import Layout
from qi2_jax.tasks import stages
from qi2_jax.tasks.transformer.config import TransformerConfig
from qi2_jax.tasks.transformer.objective import Batch
from qi2_jax.text.prompts import PromptProcessor

AHEAD = 2  # batches that are made while the devices compute those before
Item = TypeVar("Item")


class Inputs:
    """How rows become batches, whatever the samples hold.

    Args:
      config: of the transformer stage.
      samples: say what is computed online.
      model: folder with the encoders that made them.
      mesh: of the training.

    Raises:
      ValueError: if an encoder that is needed is not there.
    """

    encoder: Any = None  # of text; the compiled program reads it, see `complete`
    images: encoders.ImageEncoder | None = None

    def __init__(self, config: TransformerConfig, samples: Cache, model: pathlib.Path, mesh: Mesh):
        self.online = samples.online
        if self.online == NOTHING:
            return
        needed = ("text_encoder", "vae") if self.online == TEXT_AND_IMAGES else ("text_encoder",)
        if missing := [name for name in needed if not (model / name).is_dir()]:
            raise ValueError(
                f"{samples.folder} was encoded with encode.online={self.online}, but {model} lacks {missing}; name the "
                "encoders' folder with --model"
            )
        dtype = stages.encoder_dtype(samples.fingerprint)
        self.encoder = encoders.load(model, "text_encoder", mesh, dtype)
        self.processor = PromptProcessor.from_folder(
            model / "processor", components.read_config(model / "text_encoder", "text_encoder")
        )
        self.kernel = sharding.Attention(mesh, config.execution.kernel)
        if self.online == TEXT_AND_IMAGES:
            # A program for each bucket, an image for each device: rows of any sizes leave few places empty. Without
            # other processes' devices, no two processes have to encode the same sizes at the same time.
            own = sharding.make_mesh(sharding.MeshShape(data=len(mesh.local_devices)), mesh.local_devices)
            self.images = encoders.ImageEncoder(model, own, dtype, own.size)

    def compile(self, buckets: Iterable[Bucket]) -> None:
        """Compiles what encodes images of these sizes, so that no step waits for it."""
        if self.images is not None:
            channels = self.images.vae.config.in_channels
            self.images.latents([np.zeros((size.height, size.width, channels), np.uint8) for size in buckets])

    def latents(self, sample: Sample) -> list[Float[np.ndarray, "_ _ C"]]:
        """Of the target and the condition images of a sample."""
        if sample.target is None:
            return [sample.latents, *sample.conditions]
        assert self.images is not None
        return self.images.latents([sample.target, *sample.pictures])

    def to_batch(self, layout: Layout, rows: Rows) -> Batch:
        """Loader rows as the transformer's batch, as host arrays; what `complete` adds is still missing.

        Rows that hold latents and features are taken as they are, whatever other samples lack.
        """
        latents_BNC, conditions_BMC = rows.latents_BNC, rows.conditions_BMC
        if rows.targets:
            assert self.images is not None
            pictures = [(target, *own) for target, own in zip(rows.targets, rows.pictures, strict=True)]
            made = iter(self.images.latents([picture for own in pictures for picture in own]))
            latents_BNC, conditions_BMC = place_latents(layout, [[next(made) for _ in own] for own in pictures])
        given = Conditioning(rows.text_BTE, rows.positions_BS3, rows.valid_BS, conditions_BMC)
        prompts = online.prompt_rows(self.processor, layout, rows) if rows.prompts is not None else None
        return Batch(latents_BNC, given, prompts)

    def complete(self, frozen: Any, _: Layout, batch: Batch) -> Batch:
        """A batch with text features, inside the compiled program; `frozen` has the encoder as `text_encoder`."""
        if batch.prompts is None:
            return batch
        features = online.text_features(frozen.text_encoder, batch.prompts, kernel=self.kernel)
        return batch._replace(given=batch.given._replace(text_BTE=features), prompts=None)


def ahead(items: Iterator[Item], count: int = AHEAD) -> Iterator[Item]:
    """The same items in the same order; a thread makes the next `count` of them before they are asked for.

    An error is raised in the place of its item.
    """
    end = object()
    pool = ThreadPoolExecutor(1)
    try:
        waiting: collections.deque[Future] = collections.deque(pool.submit(next, items, end) for _ in range(count))
        while (item := waiting.popleft().result()) is not end:
            waiting.append(pool.submit(next, items, end))
            yield item
    finally:
        pool.shutdown(cancel_futures=True)
