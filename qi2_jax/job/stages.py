"""What the stages of a job share: reading and checking their configs; and the first of them, the autoencoder."""

import dataclasses
import itertools
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from data_pipeline.held import check_held_out
from data_pipeline.mixture import Shares
from data_pipeline.pictures import Crops, Pictures
from qi2_jax import attention, processes, runs, sharding
from qi2_jax import config as configs
from qi2_jax.diffusion.timesteps import LAWS, Shift, TimestepLaw
from qi2_jax.interop import weights
from qi2_jax.job import fixed_prompts, keys, models
from qi2_jax.models import lora
from qi2_jax.models.lora import LoRAConfig
from qi2_jax.models.mmdit import MMDiT, MMDiTConfig
from qi2_jax.models.vae import VAE, VAEConfig
from qi2_jax.training import checkpoint, loop
from qi2_jax.training import vae as vae_training

MAX_HELD_BYTES = 1 << 30
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def mesh_of(config: Any, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of a stage; on fake CPU devices a stage may use fewer than the job has, spread over all processes.

    Args:
      devices: to use; None: those of all processes.

    Raises:
      ValueError: if there are other devices than the mesh needs, or a process would have none of them.
    """
    shape, devices = sharding.MeshShape(**config), jax.devices() if devices is None else devices
    if jax.default_backend() == "cpu" and shape.size < len(devices):
        owners = {device.process_index for device in devices}
        devices = devices[:: len(devices) // shape.size][: shape.size]
        if without := sorted(owners - {device.process_index for device in devices}):
            raise ValueError(f"a mesh of {shape.size} devices leaves processes {without} without any; make it larger")
    return sharding.make_mesh(shape, devices)


def check(config: Any) -> None:
    """Checks what both stages read in a config, as far as that is possible without data.

    Raises:
      ValueError: naming a value that training would refuse, now rather than after hours of the stages before.
    """
    model = check_vae(config.vae)
    if config.data.channels != model.in_channels:
        raise ValueError(f"data.channels is {config.data.channels}; the autoencoder reads {model.in_channels}")
    check_transformer(config.transformer, config.data)


def check_vae(vae: Any) -> VAEConfig:
    """The autoencoder's configuration, after checking everything that its training reads in a config.

    Raises:
      ValueError: naming a value that training would refuse.
    """
    keys.check("vae", vae, keys.VAE, ("channels",))
    model = VAEConfig(**configs.dataclass_fields(vae.model))
    vae_training.make_loss(vae.loss)
    if vae.statistics_batches < 1:
        raise ValueError(f"vae.statistics_batches is {vae.statistics_batches}; it must be at least 1")
    if vae.crop < 1 or vae.crop % model.factor:
        raise ValueError(f"vae.crop is {vae.crop}; it must be a multiple of {model.factor}, the pixels of a latent")
    _check_training("vae", vae, (vae.batch_size,))
    return model


def _check_training(name: str, stage: Any, batch_sizes: Sequence[int]) -> None:
    try:
        for size in batch_sizes:
            sharding.own_rows(mesh_of(stage.mesh), size)
        loop.check(stage)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def parts_of(mesh: Mesh, batch_size: int, images_per_device: int) -> tuple[int, int]:
    """In how many equal parts a batch is computed, and the global images of one part.

    Args:
      images_per_device: at most so many at once on each device along `data` and `fsdp`; 0: the whole batch.

    Raises:
      ValueError: if the batch cannot be split over the mesh.
    """
    sharding.own_rows(mesh, batch_size)
    rows = batch_size // sharding.batch_parts(mesh)
    at_once = next(count for count in range(min(images_per_device or rows, rows), 0, -1) if rows % count == 0)
    return rows // at_once, at_once * sharding.batch_parts(mesh)


def shares_of(data: Any) -> Shares:
    """The shares of areas and tasks in a config's `data.mixture`."""
    mixture = data.mixture
    return Shares(tuple(data.sides), tuple(mixture.sides), tuple(mixture.tasks), tuple(mixture.conditions))


def check_transformer(config: Any, data: Any) -> None:
    """Raises a ValueError for a key or value in a transformer stage's config that it cannot be trained with."""
    keys.check("data", data, keys.DATA, ("channels", "workers"))
    keys.check("transformer", config, keys.TRANSFORMER)
    shares_of(data).weights()
    check_held_out(data.held_out)
    for name in ("batch_sizes", "images_per_device"):
        if len(config[name]) != len(data.sides):
            raise ValueError(f"{name} {config[name]} needs one for each of data.sides {data.sides}")
    if min(config.images_per_device) < 0:
        raise ValueError(f"images_per_device {config.images_per_device} are at least 0, which is the whole batch")
    if config.batches_per_update < 1:
        raise ValueError(f"batches_per_update is {config.batches_per_update}; it must be at least 1")
    model = MMDiTConfig(**configs.dataclass_fields(config.model))
    dtype_of(config.execution.dtype)
    attention.choose(config.execution.kernel, jax.default_backend())
    law_of(config)
    like = jax.eval_shape(lambda: MMDiT(model, key=jax.random.key(0)))  # but for the widths of the samples
    if adapter := lora_of(config):
        lora.targets(like, adapter)
    Shift(**config.timesteps.shift)
    if not 0 <= config.dropout <= 1:
        raise ValueError(f"dropout is {config.dropout}; it is a probability")
    if config.validation.samples < 1:
        raise ValueError(f"validation.samples is {config.validation.samples}; it must be at least 1")
    drawn = config.samples
    wrong = min(drawn.every, drawn.count) < 0 or drawn.steps < 2 or drawn.guidance < 1
    if wrong or not 0 <= drawn.seed < loop.MAX_SEED:
        raise ValueError(
            f"samples has every {drawn.every} and count {drawn.count} (at least 0), steps {drawn.steps} (at least 2), "
            f"guidance {drawn.guidance} (at least 1), seed {drawn.seed} (from 0 to {loop.MAX_SEED - 1})"
        )
    fixed_prompts.check(drawn, max(data.sides))
    _check_training("transformer", config, config.batch_sizes)
    sharding.left_whole(like, mesh_of(config.mesh))


def lora_of(config: Any) -> LoRAConfig | None:
    """The adapter that a transformer stage trains, None if it trains the whole model.

    Raises:
      ValueError: for a value that no adapter can have.
    """
    return LoRAConfig(config.lora.rank, config.lora.alpha, tuple(config.lora.targets)) if config.lora.rank else None


def dtype_of(name: str) -> Any:
    """The dtype of that name; raises a ValueError for others than `DTYPES`."""
    if name not in DTYPES:
        raise ValueError(f"dtype {name!r} is unknown; choose one of {sorted(DTYPES)}")
    return DTYPES[name]


def law_of(config: Any) -> TimestepLaw:
    """The timestep law, with the arguments of its own group in the config."""
    if config.timesteps.law not in LAWS:
        raise ValueError(f"timesteps.law {config.timesteps.law!r} is unknown; choose one of {sorted(LAWS)}")
    return LAWS[config.timesteps.law](**config.timesteps[config.timesteps.law])


def train_vae(
    config: Any, pictures: Pictures, out: pathlib.Path, model: pathlib.Path, *, accept_changes: bool = False
) -> None:
    """Trains the autoencoder and puts its EMA weights, with latent statistics, into the model folder.

    Args:
      accept_changes: see `loop.train`.
    """
    if (model / "vae" / f"{weights.STEM}.safetensors").is_file():
        return
    vae_config = VAEConfig(**configs.dataclass_fields(config.model))
    mesh = mesh_of(config.mesh)
    # Every picture is cropped again and again: where there is room, decoded once.
    smallest = min(min(picture.bucket.width, picture.bucket.height) for picture in pictures.chosen)
    if not 0 < config.crop <= smallest:
        raise ValueError(f"vae.crop is {config.crop}; it must fit every bucket, whose shortest side is {smallest}")
    held = list(pictures) if pictures.nbytes <= MAX_HELD_BYTES else pictures
    rows = sharding.own_rows(mesh, config.batch_size)
    crops = Crops(held, config.crop, config.batch_size, config.seed, rows)

    def feed(pixels: Any) -> loop.Feed:
        return loop.Feed(None, pixels, config.batch_size, {})

    def updates(start: int) -> Iterator[loop.Update]:
        return (loop.Update([feed(pixels)], config.batch_size) for pixels in crops.from_step(start))

    task = loop.Task(
        "autoencoder",
        lambda key: VAE(vae_config, key=key),
        vae_training.make_loss(config.loss),
        updates,
        lambda: [feed(next(crops.from_step(0)))],
        {"pictures": pictures.digest},
        ema_ramp=config.ema_ramp,
    )
    # Not `train.steps`: an end that was brought forward may lie behind.
    step = int(loop.train(task, config, out, mesh, accept_changes=accept_changes).step)
    with processes.agreed():
        if jax.process_index() == 0:
            trained = checkpoint.weights(out / runs.CHECKPOINTS / str(step), "ema")
            vae = weights.load(trained, jax.eval_shape(lambda: VAE(vae_config, key=jax.random.key(0))))
            fresh = dataclasses.replace(crops, rows=None).from_step(config.train.steps)
            crops_of_all = itertools.islice(fresh, config.statistics_batches)
            models.save_vae(model, vae, *vae_training.latent_statistics(vae, crops_of_all))
