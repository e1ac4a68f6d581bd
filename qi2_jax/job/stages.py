"""The two training stages of a job: the autoencoder, then the transformer."""

import itertools
import pathlib
from collections.abc import Hashable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from data_pipeline.loader import Loader, Rows, collate
from data_pipeline.pictures import Crops, Pictures
from data_pipeline.samples import SampleFolder
from qi2_jax import attention, runs, sharding
from qi2_jax import config as configs
from qi2_jax.diffusion.timesteps import LAWS, Shift, TimestepLaw
from qi2_jax.interop import folder
from qi2_jax.interop.weights import STEM
from qi2_jax.job import encode, models
from qi2_jax.models.mmdit import Conditioning, Execution, MMDiT, MMDiTConfig
from qi2_jax.models.vae import VAE, VAEConfig
from qi2_jax.sequence import Layout
from qi2_jax.training import checkpoint, loop
from qi2_jax.training import mmdit as transformer_training
from qi2_jax.training import vae as vae_training

TRANSFORMER = "transformer"  # the run's name in the folder of a job
MAX_HELD_BYTES = 1 << 30
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def _mesh(config: Any) -> Mesh:
    """The mesh of a stage; on fake CPU devices a stage may use fewer than the job has."""
    shape = sharding.MeshShape(**config)
    return sharding.make_mesh(shape, jax.devices()[: shape.size] if jax.default_backend() == "cpu" else None)


def check(vae: Any, transformer: Any) -> None:
    """Checks the configs of both stages, as far as that is possible before there is data.

    Raises:
      ValueError: naming a value that training would refuse, now rather than after hours of the stages before.
    """
    VAEConfig(**configs.dataclass_fields(vae.model))
    vae_training.make_loss(vae.loss)
    if vae.statistics_batches < 1 or vae.crop < VAEConfig(**configs.dataclass_fields(vae.model)).factor:
        raise ValueError(f"vae.statistics_batches {vae.statistics_batches} or vae.crop {vae.crop} is too small")
    check_transformer(transformer)
    for name, stage in (("vae", vae), ("transformer", transformer)):
        try:
            sharding.own_rows(_mesh(stage.mesh), stage.batch_size)
            loop.check(stage)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None


def check_transformer(config: Any) -> None:
    """Raises a ValueError for a value in a transformer stage's config that it cannot be trained with."""
    MMDiTConfig(**configs.dataclass_fields(config.model))
    dtype_of(config.execution.dtype)
    attention.choose(config.execution.kernel, jax.default_backend())
    _law(config)
    Shift(**config.timesteps.shift)
    if not 0 <= config.dropout <= 1:
        raise ValueError(f"dropout is {config.dropout}; it is a probability")
    if config.validation_samples < 1:
        raise ValueError(f"validation_samples is {config.validation_samples}; at least 1 is held")


def dtype_of(name: str) -> Any:
    """The dtype of that name; raises a ValueError for others than `DTYPES`."""
    if name not in DTYPES:
        raise ValueError(f"dtype {name!r} is unknown; choose one of {sorted(DTYPES)}")
    return DTYPES[name]


def _law(config: Any) -> TimestepLaw:
    """The timestep law, with the arguments of its own group in the config."""
    if config.timesteps.law not in LAWS:
        raise ValueError(f"timesteps.law {config.timesteps.law!r} is unknown; choose one of {sorted(LAWS)}")
    return LAWS[config.timesteps.law](**config.timesteps[config.timesteps.law])


def train_vae(config: Any, pictures: Pictures, out: pathlib.Path, model: pathlib.Path) -> None:
    """Trains the autoencoder and puts its EMA weights, with latent statistics, into the model folder."""
    if (model / "vae" / f"{STEM}.safetensors").is_file():
        return
    vae_config = VAEConfig(**configs.dataclass_fields(config.model))
    mesh = _mesh(config.mesh)
    # Every picture is cropped again and again: where there is room, decoded once.
    smallest = min(min(picture.bucket.width, picture.bucket.height) for picture in pictures.chosen)
    if not 0 < config.crop <= smallest:
        raise ValueError(f"vae.crop is {config.crop}; it must fit every bucket, whose shortest side is {smallest}")
    held = list(pictures) if pictures.nbytes <= MAX_HELD_BYTES else pictures
    rows = sharding.own_rows(mesh, config.batch_size)
    crops = Crops(held, config.crop, config.batch_size, config.seed, rows)
    task = loop.Task(
        "autoencoder",
        lambda key: VAE(vae_config, key=key),
        vae_training.make_loss(config.loss),
        crops.from_step,
        config.batch_size,
        {"pictures": pictures.digest},
    )
    state = loop.train(task, config, out, mesh)
    vae = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), state.ema)
    fresh = crops.from_step(config.train.steps)
    batches = (pixels for _, pixels in itertools.islice(fresh, config.statistics_batches))
    models.save_vae(model, vae, *vae_training.latent_statistics(vae, batches))


def transformer_config(config: Any, samples: SampleFolder) -> MMDiTConfig:
    """The transformer's configuration, with the widths that the encoded samples have."""
    sample = samples[0]
    return MMDiTConfig(
        **configs.dataclass_fields(config.model),
        latent_channels=sample.latents.shape[-1],
        text_width=sample.text.features.shape[-1],
    )


def give_model(config: Any, samples: SampleFolder, source: pathlib.Path | None, out: pathlib.Path) -> None:
    """Puts the encoders that made the samples into a run, so that it can sample and be exported.

    Args:
      config: of the transformer stage.
      samples: what the run trains on.
      source: a model folder; None: that of the job which the samples belong to, or none at all.
      out: the run.

    Raises:
      ValueError: if the source is no model folder, or its encoders did not make these samples.
    """
    model = out / runs.MODEL
    made = (model / folder.MARK).is_file()
    found = source or (model if made else samples.folder.parent / TRANSFORMER / runs.MODEL)
    if not (found / folder.MARK).is_file():
        if source is not None:
            raise ValueError(f"{source} is not a complete model folder (no {folder.MARK})")
        print(f"{found} does not exist: this run can train, but not sample; name the encoders' folder with --model")
        return
    differing = [name for name, digest in encode.encoders(found).items() if samples.fingerprint.get(name) != digest]
    if differing:
        raise ValueError(f"{differing} of {found} did not make the samples in {samples.folder}; see --model")
    if not made:
        models.adopt(found, model)
    if not checkpoint.steps(out / runs.CHECKPOINTS):  # nothing is trained yet: the config may still change
        models.finish(model, transformer_config(config, samples), Shift(**config.timesteps.shift))


def layout_of(samples: SampleFolder) -> Layout:
    """The layout that holds every sample."""
    return Layout(samples.largest_text, samples.largest_tokens)


def train_transformer(config: Any, samples: SampleFolder, out: pathlib.Path) -> None:
    """Trains the transformer on encoded samples; continues where an earlier call stopped."""
    mesh = _mesh(config.mesh)
    layout, model_config = layout_of(samples), transformer_config(config, samples)
    run = Execution(
        dtype_of(config.execution.dtype),
        sharding.Attention(mesh, config.execution.kernel),
        config.execution.remat,
        sharding.Constrain(mesh),
    )
    shift = Shift(**config.timesteps.shift)
    rows = sharding.own_rows(mesh, config.batch_size)
    loader = Loader(samples, samples.empty, layout, config.batch_size, config.seed, config.dropout, rows)

    def batches(start: int) -> Iterator[tuple[Hashable, Any]]:
        return ((layout, to_batch(rows)) for rows in loader.from_step(start))

    validate = transformer_training.make_validation(shift, run, config.seed + 1)
    held = _held_batches(config, samples, layout, mesh)
    task = loop.Task(
        "transformer",
        lambda key: MMDiT(model_config, key=key),
        transformer_training.make_loss(_law(config), shift, run),
        batches,
        config.batch_size,
        samples.fingerprint,
        lambda state: {"validation_loss": validate(state.ema, held)},
    )
    loop.train(task, config, out, mesh)


def to_batch(rows: Rows) -> transformer_training.Batch:
    """Loader rows as the transformer's batch."""
    given = Conditioning(rows.text_BTE, rows.positions_BS3, rows.valid_BS, rows.conditions_BMC)
    return transformer_training.Batch(rows.latents_BNC, given)


def _held_batches(config: Any, samples: SampleFolder, layout: Layout, mesh: Any) -> list[tuple[Layout, Any]]:
    """The first samples in order, as global batches: noise and times are what validation holds out."""
    size, batches = config.batch_size, []
    for start in range(0, config.validation_samples, size):
        own = [samples[(start + row) % len(samples)] for row in sharding.own_rows(mesh, size)]
        batches.append((layout, sharding.put_batch(mesh, to_batch(collate(layout, own)), size)))
    return batches
