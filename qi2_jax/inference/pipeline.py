"""Generation and editing with a loaded model: the counterpart of diffusers' `QwenImage21Pipeline`.

Dims: `B` images, `N` target slots, `C` latent channels, `h` `w` rows and columns of latents, `H` `W` pixels.
"""

import dataclasses
import functools
import logging
import math
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, UInt8
from PIL import Image

from qi2_jax import sequence, sharding
from qi2_jax.diffusion import sampler
from qi2_jax.diffusion.schedule import Schedule
from qi2_jax.inference.latents import decode_latents, encode_images
from qi2_jax.interop import components
from qi2_jax.interop import weights as storage
from qi2_jax.models.mmdit import Conditioning, Execution, MMDiT
from qi2_jax.models.qwen3_vl import Qwen3VL
from qi2_jax.models.vae import VAE
from qi2_jax.pixels import to_image, to_pixels
from qi2_jax.runs import locating
from qi2_jax.runtime import logs
from qi2_jax.text import prompts

_log = logging.getLogger(__name__)

SIDE_MULTIPLE = 32  # pixels: one feature of the encoder is 2 x 2 latents of 16 x 16 pixels
MAX_SIDE = 8192  # pixels: four times that of the largest images in training; far beyond, arrays no longer fit
TEXT_MULTIPLE = 32  # text slots are rounded up to this, so that prompts of similar length share compiled programs


def check_size(width: int, height: int) -> None:
    """Raises a ValueError for a size in pixels that cannot be generated."""
    if any(side % SIDE_MULTIPLE or not 0 < side <= MAX_SIDE for side in (width, height)):
        raise ValueError(
            f"size {width}x{height} must have sides that are multiples of {SIDE_MULTIPLE} pixels, up to {MAX_SIDE}"
        )


def _rounded(length: int) -> int:
    return -(-length // TEXT_MULTIPLE) * TEXT_MULTIPLE


def _in_own_precision(method):
    """A method of `Pipeline` whose products are in fp32 where its dtype is: TPUs would multiply in bf16."""

    @functools.wraps(method)
    def precise(self, *arguments, **options):
        with jax.default_matmul_precision("highest" if self.run.dtype == jnp.float32 else None):
            return method(self, *arguments, **options)

    return precise


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """Everything that generation needs; build it with `load`."""

    transformer: MMDiT
    vae: VAE
    encoder: Qwen3VL
    processor: prompts.PromptProcessor
    schedule: Schedule
    run: Execution

    @classmethod
    def load(
        cls,
        path: pathlib.Path | str,
        *,
        dtype: Any = jnp.bfloat16,
        item: str = "ema",
        mesh: Mesh | None = None,
        code: str | None = None,
    ) -> Self:
        """Loads a run, a checkpoint of a run, or an imported folder.

        Args:
          path: see `runs.locate`.
          dtype: of weights and activations.
          mesh: where weights and activations live; by default split over all devices.
          item: for a run, "ema" or "model" (the raw weights).
          code: round the weights to this dtype of safetensors first, as an export in that dtype does.

        Raises:
          ValueError: if something is missing or does not fit, naming it.
        """
        located = locating.locate(path, item)
        mesh = mesh or sharding.make_mesh(sharding.MeshShape(tensor=jax.device_count()))

        def load(name):
            component = components.COMPONENTS[name]
            like = component.abstract(components.read_config(located.model / name, name))
            weights = located.weights(name, item)
            if code is not None:
                weights = storage.cast(weights, code)
            with logs.loading(_log, name, sum(leaf.size for leaf in jax.tree.leaves(like))):
                return storage.load(weights, like, sharding.shardings(like, mesh), dtype)

        index = components.read_json(located.model / "model_index.json")
        return cls(
            load("transformer"),
            load("vae"),
            load("text_encoder"),
            prompts.PromptProcessor.from_folder(
                located.model / "processor", components.read_config(located.model / "text_encoder", "text_encoder")
            ),
            Schedule.from_diffusers(
                components.read_json(located.model / "scheduler" / "scheduler_config.json"), index.get("sample_sigmas")
            ),
            Execution(dtype, sharding.Attention(mesh), constrain=sharding.Constrain(mesh)),
        )

    def __call__(self, texts: Sequence[str], **options: Any) -> list[UInt8[np.ndarray, "H W c"]]:
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
        """As a call, at most `batch_size` texts at once; the batch that begins with text i takes the seed `seed + i`.

        Raises:
          ValueError: as `denoise`, for a batch size below 1, or another number of latents than of texts.
        """
        if batch_size < 1 or (latents is not None and len(latents) != len(texts)):
            raise ValueError(
                f"{len(texts)} texts in batches of {batch_size}, with latents of shape "
                f"{None if latents is None else latents.shape}: give at least 1, and as many latents as texts"
            )
        for start in range(0, len(texts), batch_size):
            part = slice(start, start + batch_size)
            own = {"sizes": sizes and sizes[part], "latents": None if latents is None else latents[part]}
            yield from self(texts[part], **own, seed=seed + start, **options)

    @_in_own_precision
    def decode(self, latents: Float[np.ndarray, "h w C"]) -> UInt8[np.ndarray, "H W c"]:
        """The image of normalised latents.

        Raises:
          ValueError: if it is not finite.
        """
        return to_image(np.asarray(decode_latents(self.vae, latents[None], self.run.dtype))[0])

    @_in_own_precision
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
    ) -> list[Float[np.ndarray, "h w C"]]:
        """Normalised latents of one image per text.

        Args:
          texts: prompts, or instructions where there are condition images.
          sizes: (width, height) of each result in pixels, multiples of 32; by default resolution x resolution, or
            with condition images the size to which the last of them is resized.
          images: condition images, the same for every text, in the order in which the text may name them.
          resolution: side of the area to which condition images are resized.
          negative: what guidance leads away from; used where `guidance` is above 1.
          guidance: scale of classifier-free guidance.
          steps, sigmas: see `Schedule.times`.
          seed: of the initial noise.
          latents: initial noise instead, one token per 16 x 16 pixels in raster order; image i takes the first tokens
            of row i.
          progress: wraps the iteration over steps.

        Raises:
          ValueError: for sizes off the grid, noise of another shape, images that the autoencoder cannot take.
        """
        resized = [prompts.resize_condition(image, resolution) for image in images]
        if sizes is None:
            sizes = [resized[-1].size if resized else (resolution, resolution)] * len(texts)
        grids = [self._grid(*size) for size in sizes]
        times = np.stack([self.schedule.times(steps, h * w, sigmas) for h, w in grids], axis=1)
        for image in resized:
            self._check_condition(*image.size)
        conditions = [self.encode(image) for image in resized]
        prompt = self._prompt(texts, resized, conditions, grids)
        other = None
        if negative is not None and guidance > 1:
            other = self._prompt([negative] * len(texts), resized, conditions, grids)

        shape = (len(texts), prompt.layout.target, self.transformer.config.latent_channels)
        if latents is None:
            latents = np.asarray(jax.random.normal(jax.random.key(seed), shape))
        elif np.shape(latents) != shape:
            raise ValueError(f"latents have shape {np.shape(latents)}, these prompts and sizes need {shape}")
        result = np.asarray(
            sampler.sample(
                self.transformer,
                latents,
                times,
                prompt,
                negative=other,
                guidance=guidance,
                run=self.run,
                progress=progress,
            )
        )
        return [row[: h * w].reshape(h, w, -1) for row, (h, w) in zip(result, grids, strict=True)]

    def _grid(self, width: int, height: int) -> sequence.Grid:
        check_size(width, height)
        return height // self.vae.config.factor, width // self.vae.config.factor

    def _check_condition(self, width: int, height: int) -> None:
        check_size(width, height)
        high = self.processor.image_processor.size["longest_edge"]  # an area, whatever it is called
        if width * height > high:
            raise ValueError(
                f"a condition image becomes {width}x{height} pixels; the model's processor takes areas up to {high} "
                f"pixels: choose a smaller --resolution, of at most about {math.isqrt(high)}"
            )

    @_in_own_precision
    def encode(self, image: Image.Image) -> Float[np.ndarray, "h w C"]:
        """Normalised latents of an image whose sides are multiples of 16 pixels."""
        pixels = to_pixels(image, self.vae.config.in_channels)
        return np.asarray(encode_images(self.vae, pixels[None], self.run.dtype))[0]

    def _prompt(self, texts, images, conditions, grids) -> sampler.Prompt:
        batch = self.processor(texts, [images] * len(texts), multiple=TEXT_MULTIPLE, enlarge=False)
        features = prompts.encode_prompts(self.encoder, batch, kernel=self.run.kernel)
        lengths = [[len(part) for part in segments.text] for segments in batch.segments]
        layout = sequence.Layout(
            text=tuple(_rounded(max(column)) for column in zip(*lengths, strict=True)),
            target=max(h * w for h, w in grids),
            conditions=tuple(latents.shape[0] * latents.shape[1] for latents in conditions),
        )
        shapes = [latents.shape[:2] for latents in conditions]
        for (h, w), span in zip(shapes, batch.segments[0].images, strict=True):
            if 4 * len(span) != h * w:
                raise ValueError(
                    f"the encoder sees {len(span)} features of a condition image of {h * w} latents, not a quarter: "
                    "the image processor of this model resized it again"
                )
        placed = [sequence.place(layout, *sample, shapes) for sample in zip(lengths, grids, strict=True)]
        text = np.zeros((len(texts), sum(layout.text), features[0].shape[-1]), np.float32)
        starts = np.cumsum([0, *layout.text])
        for row, own, segments in zip(text, features, batch.segments, strict=True):
            for start, part in zip(starts, segments.text, strict=False):
                row[start : start + len(part)] = own[part.start : part.stop]
        flat = [latents.reshape(1, -1, latents.shape[-1]) for latents in conditions]
        given = Conditioning(
            text,
            np.stack([positions for positions, _ in placed]),
            np.stack([valid for _, valid in placed]),
            np.repeat(np.concatenate(flat, axis=1), len(texts), axis=0) if flat else None,
        )
        return sampler.Prompt(layout, given)
