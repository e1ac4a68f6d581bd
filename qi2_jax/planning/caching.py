"""Ahead-of-time compilation of the caching job, `qi2 data cache`, for the TPU chips of one host.

It compiles the functions with which `inference.encoders` computes latents and text features, on shapes instead of
arrays. No weights are read.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from data_pipeline.samples.schema import NOTHING, TEXT_AND_IMAGES
from qi2_jax import sharding
from qi2_jax.inference import encoders, tiling
from qi2_jax.inference.latents import encode_images
from qi2_jax.interop import components
from qi2_jax.models.qwen3_vl.config import Qwen3VLConfig, TextConfig, VisionConfig
from qi2_jax.models.qwen3_vl.inputs import EncoderInputs, prepare_inputs
from qi2_jax.models.vae import VAEConfig
from qi2_jax.planning import hlo
from qi2_jax.planning.compile import GIB, bytes_of, compile_for
from qi2_jax.planning.programs import ProgramPlan, kernel_flops, no_kernels, plan_program
from qi2_jax.planning.stage import Stream
from qi2_jax.tasks.transformer.config import StageConfig
from qi2_jax.text.prompts import hidden_states
from qi2_jax.training.step import abstract

PUBLISHED_VAE = VAEConfig()
SYSTEM = 14  # tokens of the system turn, which the encoder reads and samples do not contain
# The published configuration of Qwen3-VL-8B, the condition encoder of Qwen-Image-2.1.
QWEN3_VL_8B = Qwen3VLConfig(
    VisionConfig(
        depth=27,
        hidden_size=1152,
        intermediate_size=4304,
        num_heads=16,
        in_channels=3,
        patch_size=16,
        temporal_patch_size=2,
        spatial_merge_size=2,
        out_hidden_size=4096,
        num_position_embeddings=2304,
        deepstack_visual_indexes=(8, 16, 24),
    ),
    TextConfig(
        vocab_size=151_936,
        hidden_size=4096,
        intermediate_size=12_288,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        rms_norm_eps=1e-6,
        rope_theta=5e6,
    ),
    image_token_id=151_655,
    video_token_id=151_656,
)


@dataclasses.dataclass(frozen=True)
class CachingJob:
    """The encoders of a caching job.

    Attributes:
      vae: architecture of the autoencoder.
      text_encoder: architecture of the condition encoder.
      mesh: chips of one host, see `compile.host_mesh`.
      dtype, batch_size, online: see `encoders.Encoders`.

    Raises:
      ValueError: if the batch does not split over the mesh, or training computes everything itself.
    """

    mesh: Mesh
    dtype: jnp.dtype
    batch_size: int
    online: str = NOTHING
    vae: VAEConfig = PUBLISHED_VAE
    text_encoder: Qwen3VLConfig = QWEN3_VL_8B

    def __post_init__(self) -> None:
        sharding.local_rows(self.mesh, self.batch_size)
        if self.online == TEXT_AND_IMAGES:
            raise ValueError(f"encode.online is {self.online!r}: the caching job encodes nothing, so there is no plan")

    def with_encoders_of(self, model: pathlib.Path) -> Self:
        """The same job with the architectures that the `config.json` files of a model folder describe.

        Raises:
          ValueError: as `components.read_config`.
        """
        read = lambda name: components.read_config(model / name, name)  # noqa: E731
        return dataclasses.replace(self, vae=read("vae"), text_encoder=read("text_encoder"))

    @functools.cached_property
    def weights(self) -> dict[str, Any]:
        """Shapes and shardings of the encoders that the job loads, by component."""
        found = {"vae": encoders.encoder_half(self._abstract("vae", self.vae))}
        if self.online == NOTHING:
            found["text_encoder"] = self._abstract("text_encoder", self.text_encoder)
        return found

    def _abstract(self, name: str, config: Any) -> Any:
        like = components.COMPONENTS[name].abstract(config)
        like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, self.dtype), like)
        return abstract(like, sharding.shardings(like, self.mesh))

    def plan_images(self, width: int, height: int) -> ProgramPlan:
        """Compiles the encoding of a batch of images of one size.

        Raises:
          ValueError: for images that are encoded in tiles, or a program that does not fit the chip.
        """
        if width * height > tiling.MAX_ENCODED_WHOLE:
            raise ValueError(f"images of {width} x {height} pixels are encoded in tiles, which have no plan")
        count = encoders.images_at_once(self.mesh, self.batch_size, width, height)
        shape = count, height, width, self.vae.in_channels
        pixels = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding.batch_sharding(self.mesh))
        program = encode_images.compiled()
        vae = self.weights["vae"]
        return self._plan(f"images, {width} x {height}", count, vae, no_kernels, program, vae, pixels, self.dtype)

    def plan_prompts(self, tokens: int, images: int = 0, patches: int = 0) -> ProgramPlan:
        """Compiles the encoding of a batch of prompts.

        Args:
          tokens: features of the longest prompt, for text and condition images.
          images: condition images of each prompt.
          patches: patches of the largest condition image.

        Raises:
          ValueError: for a program that does not fit the chip.
        """
        count = encoders.prompts_at_once(self.mesh, self.batch_size, images, patches)
        length = -(-(SYSTEM + tokens) // encoders.LENGTH_MULTIPLE) * encoders.LENGTH_MULTIPLE
        one = prepare_inputs(
            self.text_encoder, [[0]], length=length, image_count=images or None, patch_count=patches or None
        )

        def batch(leaf: np.ndarray, place: NamedSharding) -> jax.ShapeDtypeStruct:
            dim = len(place.spec) - 1  # the last one that is sharded: of prompts, or of their images
            shape = [size * count if at == dim else size for at, size in enumerate(leaf.shape)]
            return jax.ShapeDtypeStruct(tuple(shape), leaf.dtype, sharding=place)

        inputs: EncoderInputs = jax.tree.map(batch, one, encoders.places(self.mesh, one))
        name, model = f"prompts, {length} tokens, {images} images", self.weights["text_encoder"]
        read, kernel = model if images else model.language_model, sharding.Attention(self.mesh)
        program = hidden_states.compiled()
        return self._plan(name, count, read, _tower_flops(length), program, model, inputs, kernel)

    @property
    def _tapped_share(self) -> float:
        """Share of the layers of the text tower that add a feature of DeepStack, the only conditional of a program."""
        taps = len(self.text_encoder.vision.deepstack_visual_indexes)
        return taps / self.text_encoder.text.num_hidden_layers

    def _plan(
        self, name: str, count: int, read: Any, kernels: Callable[..., float], program: Any, *arguments: Any
    ) -> ProgramPlan:
        """The plan of a program that reads the weights `read` and leaves the job's others on the chips."""
        way_out = "lower encode.batch_size, or give encode.mesh.fsdp more of the chips"
        try:
            compiled, seconds = compile_for(self.mesh, program, *arguments)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise ValueError(f"the encoding of {count} {name}, does not fit a chip; {way_out}: {error}") from error
        plan = plan_program(name, count, self.mesh, compiled, seconds, kernels, self._tapped_share)
        plan = dataclasses.replace(plan, resident=bytes_of(self.weights) - bytes_of(read))
        if plan.memory_total > plan.chip.hbm_bytes:
            raise ValueError(
                f"the encoding of {count} {name}, needs {plan.memory_total / GIB:.2f} GiB of a chip with "
                f"{plan.chip.hbm_bytes / GIB:.2f} GiB, with the weights of both encoders; {way_out}"
            )
        return plan


def plan_caching(
    job: CachingJob,
    config: StageConfig,
    streams: Sequence[Stream],
    progress: Callable[[str], Any] = lambda text: None,
) -> tuple[ProgramPlan, ...]:
    """Compiles the encoding of a stage's largest images, its longest prompts, and prompts with the most images.

    Args:
      job: encoders.
      config: config of the stage.
      streams: result of `stage.streams_of_stage`.
      progress: function that is called with a text before each compilation.

    Raises:
      ValueError: for a program that does not fit the chip, see `CachingJob`.
    """
    largest = max(config.data.resolutions.areas[-1][1].sizes, key=lambda size: size.tokens)
    progress("compiling the encoder of images")
    plans = [job.plan_images(largest.width, largest.height)]
    if job.online != NOTHING:
        return tuple(plans)
    merged = job.text_encoder.vision.spatial_merge_size**2
    by_images = {stream.key.conditions: stream for stream in sorted(streams, key=lambda stream: stream.key.side)}
    for images in sorted({0, max(by_images)} & set(by_images)):
        stream = by_images[images]  # that of the largest images
        patches = config.data.resolutions.buckets(stream.key.side).max_tokens if images else 0
        progress(f"compiling the encoder of prompts with {images} condition images")
        tokens = sum(stream.layouts[-1].text) + images * patches // merged
        plans.append(job.plan_prompts(tokens, images, patches))
    return tuple(plans)


def _tower_flops(length: int) -> Callable[[hlo.Instruction, Sequence[hlo.Shape]], float]:
    """The operations of attention, which is causal in the text tower, and sees whole images in the vision tower."""
    formulas = {"qwen3_vl/text": kernel_flops(np.arange(length) + 1), "qwen3_vl/vision": kernel_flops(None)}

    def operations(call: hlo.Instruction, operands: Sequence[hlo.Shape]) -> float:
        (tower,) = [name for name in formulas if name in call.rest]
        return formulas[tower](call, operands)

    return operations
