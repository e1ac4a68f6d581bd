"""The transformer's config."""

import dataclasses
from typing import Self

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from data_pipeline.config import DataConfig
from data_pipeline.loading.mixture import streams_of
from data_pipeline.loading.text_slots import TextSlots
from data_pipeline.samples import encoding
from data_pipeline.samples.cache import Cache, StreamKey, check_fingerprint
from qi2_jax import attention, sharding
from qi2_jax.config.fields import changeable, check_at_least, check_one_of, choice
from qi2_jax.diffusion.timesteps import TIMESTEP_DISTRIBUTIONS, Shift, TimestepDistribution
from qi2_jax.models import lora
from qi2_jax.models.lora import LoRAConfig
from qi2_jax.models.mmdit import MMDiT, MMDiTConfig
from qi2_jax.models.recomputation import POLICIES
from qi2_jax.sequence import Layout
from qi2_jax.tasks import devices
from qi2_jax.tasks.devices import COMPUTE_DTYPES, check_batch_sizes, make_mesh
from qi2_jax.tasks.transformer import fixed_prompts
from qi2_jax.tasks.transformer.samples_config import Samples
from qi2_jax.training.config import TrainingConfig, ValidationSchedule

FIT = "fit"  # value of `ExecutionConfig.keep`


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExecutionConfig:
    """How the transformer runs.

    Attributes:
      dtype: dtype of activations, "float32" or "bfloat16".
      kernel: attention kernel, see `qi2_jax.attention`; "auto": the fastest on these devices.
      remat: whether blocks are computed again in the backward pass, which saves memory.
      keep: what the backward pass then keeps of each block: "inputs", "attention", "projections", "gate" or "hidden",
        each with those before, or "host", see `qi2_jax.models.recomputation`; or "fit": each program keeps as much as
        `activations_gib` has room for.
      activations_gib: memory of a device for activations, in GiB, if `keep` is "fit".
      blocks_per_step: number of blocks in a step of the loop over blocks; see `Execution.unroll`.
      shard_sum: dtype in which gradients of the blocks' matrices are added up across `fsdp` and `tensor`, for every
        microbatch: "float32" or "bfloat16", or `dtype` if that is wider.
      replica_sum: dtype in which gradients are added up across `data`, once in an update: "float32" or "bfloat16".

    Raises:
      ValueError: for an unknown kernel or policy, or a negative size.
    """

    dtype: jnp.dtype = choice(COMPUTE_DTYPES)
    kernel: str
    remat: bool
    keep: str = changeable(default="inputs")
    activations_gib: float = changeable(default=0.0)
    blocks_per_step: int = changeable(default=1)
    shard_sum: jnp.dtype = choice(COMPUTE_DTYPES, default=jnp.dtype("bfloat16"))
    replica_sum: jnp.dtype = choice(COMPUTE_DTYPES, default=jnp.dtype("float32"))

    def __post_init__(self) -> None:
        check_one_of(self, "kernel", [*attention.KERNELS, "auto"])
        check_one_of(self, "keep", [*POLICIES, FIT])
        check_at_least(self, activations_gib=0, blocks_per_step=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TimestepConfig:
    """The times at which the transformer trains.

    Attributes:
      law: timestep distribution of training; the group with its name has its arguments.
      shift: shift of times with resolution, shared by training, validation and sampling.
    """

    law: TimestepDistribution = choice(TIMESTEP_DISTRIBUTIONS)
    shift: Shift


@dataclasses.dataclass(frozen=True)
class StartConfig:
    """The source of a new run's weights.

    Attributes:
      folder: run, checkpoint or imported folder whose transformer the run starts from; "": random weights.
    """

    folder: str


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """The low-rank adapter that is trained instead of the whole transformer, see `LoRAConfig`.

    Attributes:
      rank: rank of the adapter; 0: no adapter.

    Raises:
      ValueError: for a value out of its range.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]

    def __post_init__(self) -> None:
        _ = self.adapter

    @property
    def adapter(self) -> LoRAConfig | None:
        """The adapter, None if the whole transformer is trained."""
        return LoRAConfig(self.rank, self.alpha, self.targets) if self.rank else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Validation(ValidationSchedule):
    """When and on what a run is validated.

    Attributes:
      samples: held-out samples of each stream on which the loss is measured.

    Raises:
      ValueError: for a value out of its range.
    """

    samples: int

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, samples=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig(TrainingConfig):
    """Config of a run that trains the transformer.

    Attributes:
      model: shape of the transformer; the widths of latents and text are those of the samples.
      batch_sizes: images of a batch, for each of `data.sides`.
      images_per_device: largest number of images that a device computes at once, for each of `data.sides`; larger
        batches are split into microbatches. 0: the whole batch.
      slots_per_device: largest number of slots, padding included, that the devices of one shard of a batch compute at
        once (those along `tensor` share it), unless one image has more; 0: only `images_per_device` counts. Streams
        without condition images then have larger microbatches.
      batches_per_update: batches whose gradients are accumulated for an update.
      dropout: probability of replacing a text by the empty prompt.
      text_slots: how batches are formed by the lengths of their texts.

    Raises:
      ValueError: for a value out of its range.
    """

    model: MMDiTConfig
    execution: ExecutionConfig
    batch_sizes: tuple[int, ...]
    images_per_device: tuple[int, ...] = changeable()
    slots_per_device: int = changeable(default=0)
    batches_per_update: int
    dropout: float
    text_slots: TextSlots = TextSlots()  # noqa: RUF009
    timesteps: TimestepConfig
    start: StartConfig = changeable()
    lora: AdapterConfig
    validation: Validation
    samples: Samples = changeable()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, batches_per_update=1, slots_per_device=0)
        if min(self.images_per_device, default=0) < 0:
            raise ValueError(f"images_per_device is {self.images_per_device}; it must be >= 0 (0 = whole batch)")
        if not 0 <= self.dropout <= 1:
            raise ValueError(f"dropout is {self.dropout}; it must be a probability")

    @property
    def adapter(self) -> LoRAConfig | None:
        """The adapter that the run trains, None if it trains the whole transformer."""
        return self.lora.adapter


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageConfig:
    """The part of a stage's config that the training of the transformer reads.

    Raises:
      ValueError: for a value out of its range.
    """

    data: DataConfig
    transformer: TransformerConfig

    def __post_init__(self) -> None:
        for name in ("batch_sizes", "images_per_device"):
            if len(values := getattr(self.transformer, name)) != len(self.data.sides):
                raise ValueError(
                    f"transformer.{name} is {values}; it needs one number for each of data.sides {self.data.sides}"
                )

    def with_start(self, folder: str) -> Self:
        """The same stage with another `transformer.start.folder`."""
        typed = {**self.transformer.as_typed, "start": {"folder": folder}}
        transformer = dataclasses.replace(self.transformer, start=StartConfig(folder), as_typed=typed)
        return dataclasses.replace(self, transformer=transformer)


def microbatches_of(config: StageConfig, key: StreamKey, largest: Layout, mesh: Mesh) -> tuple[int, int]:
    """The number of microbatches in a batch of a stream, and the images of one microbatch over all devices.

    Args:
      config: config of the stage.
      key: stream of the samples.
      largest: its largest layout.
      mesh: devices of the run.

    Raises:
      ValueError: if the batch cannot be split over the mesh.
    """
    transformer, place = config.transformer, config.data.sides.index(key.side)
    size, most = transformer.batch_sizes[place], transformer.images_per_device[place]
    return devices.microbatches_of(mesh, size, most, transformer.slots_per_device, largest.length)


def check_transformer(config: StageConfig) -> None:
    """Checks a config against the devices of this job, the transformer's layers, and the images that it names.

    Raises:
      ValueError: naming what cannot work.
    """
    transformer = config.transformer
    attention.choose(transformer.execution.kernel, jax.devices()[0])
    # The samples determine the widths of latents and text, which do not matter here.
    like = abstract_transformer(transformer.model)
    if transformer.adapter is not None:
        lora.targets(like, transformer.adapter)
    fixed_prompts.check_images(transformer.samples, max(config.data.sides))
    check_batch_sizes("transformer", transformer.mesh, transformer.batch_sizes)
    sharding.unsharded_weights(like, make_mesh(transformer.mesh))


def abstract_transformer(config: MMDiTConfig) -> MMDiT:
    """Shapes and dtypes of a transformer, without memory."""
    return jax.eval_shape(lambda: MMDiT(config, key=jax.random.key(0)))


def model_config_for(config: TransformerConfig, samples: Cache) -> MMDiTConfig:
    """The shape of the transformer, with the widths of latents and text that the encoded samples have."""
    sample = samples.streams[0][0]
    return dataclasses.replace(
        config.model,
        latent_channels=sample.latents.shape[-1] or samples.fingerprint["latent_channels"],
        text_width=sample.texts[0].features.shape[-1] or samples.fingerprint["text_width"],
    )


def check_samples(config: StageConfig, samples: Cache) -> None:
    """Checks that a config's group `data` describes encoded samples.

    Raises:
      ValueError: if they were prepared in another way, or lack a stream that has a share.
    """
    check_fingerprint(samples.folder, samples.fingerprint, encoding.preprocessing(config.data))
    streams_of(samples, config.data.shares)
