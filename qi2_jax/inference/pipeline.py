"""Generation and editing with a loaded model: the counterpart of diffusers' `QwenImage21Pipeline`.

Dims: `B` images, `N` target slots, `C` latent channels, `h` `w` rows and columns of latents, `H` `W` pixels.
"""

import dataclasses
import functools
import logging
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, UInt8
from PIL import Image

from data_pipeline.loading.batch import collate
from data_pipeline.samples.schema import Sample, Text
from qi2_jax import sequence, sharding
from qi2_jax.diffusion import sampler
from qi2_jax.diffusion.noise import initial_noise
from qi2_jax.diffusion.schedule import Schedule
from qi2_jax.inference import tiling
from qi2_jax.inference.sizes import check_size
from qi2_jax.interop import components, folder, stored_weights
from qi2_jax.interop.lora import merging, reading
from qi2_jax.models.mmdit import Execution, MMDiT
from qi2_jax.models.qwen3_vl.model import Qwen3VL
from qi2_jax.models.vae import VAE
from qi2_jax.pixels import to_image, to_pixels
from qi2_jax.runs import locating
from qi2_jax.runtime import logs
from qi2_jax.text import prompts

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

_log = logging.getLogger(__name__)

TEXT_MULTIPLE = 32  # granularity of text slots: prompts of similar length share compiled programs


def _rounded(length: int) -> int:
    return -(-length // TEXT_MULTIPLE) * TEXT_MULTIPLE


def _full_precision(
    method: Callable[Concatenate["Pipeline", Arguments], Result],
) -> Callable[Concatenate["Pipeline", Arguments], Result]:
    """Decorates a method of `Pipeline`: with dtype float32, products are in fp32 too, where TPUs would use bf16."""

    @functools.wraps(method)
    def precise(self: "Pipeline", *arguments: Arguments.args, **options: Arguments.kwargs) -> Result:
        with jax.default_matmul_precision("highest" if self.execution.dtype == jnp.float32 else None):
            return method(self, *arguments, **options)

    return precise


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """The models, processor and schedule of generation; created by `load`."""

    transformer: MMDiT
    vae: VAE
    encoder: Qwen3VL
    processor: prompts.PromptProcessor
    schedule: Schedule
    execution: Execution

    @classmethod
    def load(
        cls,
        path: pathlib.Path | str,
        *,
        dtype: Any = jnp.bfloat16,
        item: str = "ema",
        mesh: Mesh | None = None,
        code: str | None = None,
        loras: Sequence[tuple[pathlib.Path, float]] = (),
    ) -> Self:
        """Loads a run, a checkpoint of a run, or an imported folder.

        Args:
          path: run, checkpoint or imported folder, see `locating.locate`.
          dtype: dtype of weights and activations.
          mesh: devices of weights and activations; by default all devices, with the weights split over them.
          item: weights of a run: "ema" (averaged) or "model" (raw).
          code: safetensors code of a dtype to which the weights are rounded first, as an export in it does.
          loras: adapters (file or folder, scale) to merge into the transformer in fp32.

        Raises:
          ValueError: naming what is missing or does not fit.
        """
        located = locating.locate(path, item)
        mesh = mesh or sharding.make_mesh(sharding.MeshShape(tensor=jax.device_count()))

        def load(name: str) -> Any:
            component = components.COMPONENTS[name]
            config = components.read_config(located.model / name, name)
            like = component.abstract(config)
            weights = located.weights(name, item)
            for file, scale in loras if name == "transformer" else ():
                weights = merging.merged(weights, merging.scaled(reading.read(file, config), scale))
            if code is not None:
                weights = stored_weights.cast(weights, code)
            with logs.loading(_log, name, sum(leaf.size for leaf in jax.tree.leaves(like))):
                return stored_weights.load(weights, like, sharding.shardings(like, mesh), dtype)

        return cls(
            load("transformer"),
            load("vae"),
            load("text_encoder"),
            prompts.PromptProcessor.from_folder(
                located.model / "processor", components.read_config(located.model / "text_encoder", "text_encoder")
            ),
            folder.read_schedule(located.model),
            Execution(dtype, sharding.Attention(mesh), constrain=sharding.Constrain(mesh)),
        )

    def __call__(self, texts: Sequence[str], **options: Any) -> list[UInt8[np.ndarray, "_ _ c"]]:
        """Generates one image per text; for the arguments and errors see `denoise`."""
        return [self.decode(latents) for latents in self.denoise(texts, **options)]

    def in_batches(
        self,
        texts: Sequence[str],
        *,
        sizes: Sequence[tuple[int, int]] | None = None,
        latents: Float[np.ndarray, "B N C"] | None = None,
        batch_size: int,
        seed: int = 0,
        **options: Any,
    ) -> Iterator[UInt8[np.ndarray, "H W c"]]:
        """Generates one image per text, at most `batch_size` at once; the noise does not depend on `batch_size`.

        Raises:
          ValueError: as `denoise`, for a batch size below 1, or if the number of latents is not that of the texts.
        """
        if batch_size < 1 or (latents is not None and len(latents) != len(texts)):
            raise ValueError(
                f"{len(texts)} texts in batches of {batch_size}, with latents of shape "
                f"{None if latents is None else latents.shape}: the batch size must be at least 1, and the number of "
                "latents that of the texts"
            )
        for start in range(0, len(texts), batch_size):
            part = slice(start, start + batch_size)
            inputs = {"sizes": sizes and sizes[part], "latents": None if latents is None else latents[part]}
            yield from self(texts[part], **inputs, seed=seed + start, **options)

    @_full_precision
    def decode(self, latents: Float[np.ndarray, "h w C"]) -> UInt8[np.ndarray, "H W c"]:
        """Decodes normalised latents to an image; a large one in tiles, see `tiling.decode`.

        Raises:
          ValueError: if a pixel is not finite.
        """
        return to_image(tiling.decode(self.vae, latents[None], self.execution.dtype)[0])

    @_full_precision
    def denoise(
        self,
        texts: Sequence[str],
        *,
        sizes: Sequence[tuple[int, int]] | None = None,
        images: Sequence[Image.Image] = (),
        resolution: int = 1024,
        negative: str | None = None,
        guidance: float = 1.0,
        steps: int = 40,
        sigmas: Sequence[float] | None = None,
        seed: int = 0,
        latents: Float[np.ndarray, "B N C"] | None = None,
        progress: Callable[[Iterable], Iterable] = iter,
    ) -> list[Float[np.ndarray, "_ _ C"]]:
        """Samples the normalised latents of one image per text.

        Args:
          texts: prompts, or instructions for an edit with condition images.
          sizes: (width, height) of each result in pixels, multiples of 32. The default is resolution x resolution, or
            with condition images the size to which the last of them is resized.
          images: condition images, the same for every text; a text may refer to them by their order.
          resolution: side of a square with the area that condition images are resized to.
          negative: negative prompt; used if `guidance` is above 1.
          guidance: scale of classifier-free guidance.
          steps, sigmas: see `Schedule.times`.
          seed: seed of the initial noise; image i has that of `seed + i`, see `initial_noise`.
          latents: initial noise that replaces that of the seed, one token per 16 x 16 pixels in raster order; image i
            takes the first tokens of row i.
          progress: wrapper of the iteration over steps.

        Raises:
          ValueError: for sizes off the grid, noise of another shape, or condition images that do not fit the models.
        """
        resized = [prompts.resize_condition(image, resolution) for image in images]
        for image in resized:
            check_size(*image.size)
        if sizes is None:
            sizes = [resized[-1].size if resized else (resolution, resolution)] * len(texts)
        grids = [self._grid(*size) for size in sizes]
        times = np.stack([self.schedule.times(steps, h * w, sigmas) for h, w in grids], axis=1)
        sides = [list(texts)]
        if negative is not None and guidance > 1:
            sides.append([negative] * len(texts))
        prompt, *other = self._prompts(sides, resized, grids)
        slots, channels = prompt.layout.target, self.transformer.config.latent_channels
        noise = initial_noise(seed, [h * w for h, w in grids], slots, channels) if latents is None else latents
        if noise.shape != (shape := (len(texts), slots, channels)):
            raise ValueError(f"latents have shape {noise.shape}, these prompts and sizes need {shape}")
        result = sampler.sample(
            self.transformer,
            noise,
            times,
            prompt,
            negative=other[0] if other else None,
            guidance=guidance,
            execution=self.execution,
            progress=progress,
        )
        return [row[: h * w].reshape(h, w, -1) for row, (h, w) in zip(np.asarray(result), grids, strict=True)]

    def _grid(self, width: int, height: int) -> sequence.Grid:
        check_size(width, height)
        return height // self.vae.config.factor, width // self.vae.config.factor

    @_full_precision
    def encode(self, image: Image.Image) -> Float[np.ndarray, "h w C"]:
        """Normalised latents of an image whose sides are multiples of 16 pixels."""
        pixels = to_pixels(image, self.vae.config.in_channels)
        return np.asarray(tiling.encode(self.vae, pixels[None], self.execution.dtype))[0]

    def _prompts(
        self, sides: Sequence[Sequence[str]], images: Sequence[Image.Image], grids: Sequence[sequence.Grid]
    ) -> list[sampler.Prompt]:
        """Encodes the texts of each side of guidance (prompts, negative prompts) with the resized condition images."""
        # The processor checks all prompts before the devices start to compute.
        batches = [
            self.processor(texts, [images] * len(texts), multiple=TEXT_MULTIPLE, enlarge=False) for texts in sides
        ]
        conditions = tuple(self.encode(image) for image in images)
        return [self._prompt(batch, conditions, grids) for batch in batches]

    def _prompt(
        self,
        batch: prompts.PromptBatch,
        conditions: tuple[Float[np.ndarray, "_ _ C"], ...],
        grids: Sequence[sequence.Grid],
    ) -> sampler.Prompt:
        """Encodes one side of guidance and packs it as training does."""
        features = prompts.encode_prompts(self.encoder, batch, kernel=self.execution.kernel)
        texts = [
            Text(rows[segments.text_indices].astype(np.float32), segments.text_lengths)
            for rows, segments in zip(features, batch.segments, strict=True)
        ]
        layout = sequence.Layout(
            text=tuple(_rounded(max(column)) for column in zip(*(text.lengths for text in texts), strict=True)),
            target=max(h * w for h, w in grids),
            conditions=tuple(latents.shape[0] * latents.shape[1] for latents in conditions),
        )
        channels = self.transformer.config.latent_channels
        targets = [np.zeros((*grid, channels), np.float32) for grid in grids]  # only their sizes matter
        samples = [
            Sample(target, (text,), conditions, text if conditions else None)
            for target, text in zip(targets, texts, strict=True)
        ]
        return sampler.Prompt(layout, collate(layout, samples).cond)
