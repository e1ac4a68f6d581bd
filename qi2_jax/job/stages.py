"""The two training stages of a job: the autoencoder, then the transformer."""

import itertools
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from data_pipeline import encode
from data_pipeline.cache import Cache, check_fingerprint
from data_pipeline.loader import Row, Rows, collate
from data_pipeline.mixture import Mixture, Shares, Stream, streams_of
from data_pipeline.pictures import Crops, Pictures
from qi2_jax import attention, encoders, online, runs, sharding
from qi2_jax import config as configs
from qi2_jax.diffusion.timesteps import LAWS, Shift, TimestepLaw
from qi2_jax.interop import components, folder
from qi2_jax.interop.weights import STEM
from qi2_jax.job import models
from qi2_jax.models.mmdit import Conditioning, Execution, MMDiT, MMDiTConfig
from qi2_jax.models.vae import VAE, VAEConfig
from qi2_jax.prompts import PromptProcessor
from qi2_jax.sequence import Layout
from qi2_jax.training import checkpoint, loop
from qi2_jax.training import mmdit as transformer_training
from qi2_jax.training import vae as vae_training

MAX_HELD_BYTES = 1 << 30
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def mesh_of(config: Any) -> Mesh:
    """The mesh of a stage; on fake CPU devices a stage may use fewer than the job has."""
    shape = sharding.MeshShape(**config)
    return sharding.make_mesh(shape, jax.devices()[: shape.size] if jax.default_backend() == "cpu" else None)


def check(config: Any) -> None:
    """Checks what both stages read in a config, as far as that is possible without data.

    Raises:
      ValueError: naming a value that training would refuse, now rather than after hours of the stages before.
    """
    vae = config.vae
    model = VAEConfig(**configs.dataclass_fields(vae.model))
    vae_training.make_loss(vae.loss)
    if vae.statistics_batches < 1:
        raise ValueError(f"vae.statistics_batches is {vae.statistics_batches}; it must be at least 1")
    if vae.crop < 1 or vae.crop % model.factor:
        raise ValueError(f"vae.crop is {vae.crop}; it must be a multiple of {model.factor}, the pixels of a latent")
    if config.data.channels != model.in_channels:
        raise ValueError(f"data.channels is {config.data.channels}; the autoencoder reads {model.in_channels}")
    check_transformer(config.transformer, config.data)
    _check_training("vae", vae, (vae.batch_size,))


def _check_training(name: str, stage: Any, batch_sizes: Sequence[int]) -> None:
    try:
        for size in batch_sizes:
            sharding.own_rows(mesh_of(stage.mesh), size)
        loop.check(stage)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def shares_of(data: Any) -> Shares:
    """The shares of areas and tasks in a config's `data.mixture`."""
    mixture = data.mixture
    return Shares(tuple(data.sides), tuple(mixture.sides), tuple(mixture.tasks), tuple(mixture.conditions))


def check_transformer(config: Any, data: Any) -> None:
    """Raises a ValueError for a value in a transformer stage's config that it cannot be trained with."""
    shares_of(data).weights()
    if len(config.batch_sizes) != len(data.sides):
        raise ValueError(f"batch_sizes {config.batch_sizes} needs one for each of data.sides {data.sides}")
    MMDiTConfig(**configs.dataclass_fields(config.model))
    dtype_of(config.execution.dtype)
    attention.choose(config.execution.kernel, jax.default_backend())
    _law(config)
    Shift(**config.timesteps.shift)
    if not 0 <= config.dropout <= 1:
        raise ValueError(f"dropout is {config.dropout}; it is a probability")
    if config.validation_samples < 1:
        raise ValueError(f"validation_samples is {config.validation_samples}; at least 1 is held")
    _check_training("transformer", config, config.batch_sizes)


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
    mesh = mesh_of(config.mesh)
    # Every picture is cropped again and again: where there is room, decoded once.
    smallest = min(min(picture.bucket.width, picture.bucket.height) for picture in pictures.chosen)
    if not 0 < config.crop <= smallest:
        raise ValueError(f"vae.crop is {config.crop}; it must fit every bucket, whose shortest side is {smallest}")
    held = list(pictures) if pictures.nbytes <= MAX_HELD_BYTES else pictures
    rows = sharding.own_rows(mesh, config.batch_size)
    crops = Crops(held, config.crop, config.batch_size, config.seed, rows)

    def batches(start: int) -> Iterator[loop.Feed]:
        return (loop.Feed(None, pixels, config.batch_size, {}) for pixels in crops.from_step(start))

    task = loop.Task(
        "autoencoder",
        lambda key: VAE(vae_config, key=key),
        vae_training.make_loss(config.loss),
        batches,
        {"pictures": pictures.digest},
    )
    state = loop.train(task, config, out, mesh)
    vae = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), state.ema)
    fresh = crops.from_step(config.train.steps)
    crops_of_all = itertools.islice(fresh, config.statistics_batches)
    models.save_vae(model, vae, *vae_training.latent_statistics(vae, crops_of_all))


def transformer_config(config: Any, samples: Cache) -> MMDiTConfig:
    """The transformer's configuration, with the widths that the encoded samples have."""
    sample = samples.streams[0][0]
    return MMDiTConfig(
        **configs.dataclass_fields(config.model),
        latent_channels=sample.latents.shape[-1],
        text_width=sample.texts[0].features.shape[-1] or samples.fingerprint["text_width"],
    )


def give_model(config: Any, samples: Cache, source: pathlib.Path | None, out: pathlib.Path) -> None:
    """Puts the encoders that made the samples into a run, so that it can sample and be exported.

    Args:
      config: of the transformer stage.
      samples: what the run trains on.
      source: a model folder, or a run or job with one; None: that of the job which the samples belong to, or none.
      out: the run.

    Raises:
      ValueError: if the source is no model folder, or its encoders did not make these samples.
    """
    model = out / runs.MODEL
    made = (model / folder.MARK).is_file()
    if source is not None:
        found = runs.model_of(source)
    else:
        found = model if made else samples.folder.parent / runs.TRANSFORMER / runs.MODEL
    if not (found / folder.MARK).is_file():
        if source is not None:
            raise ValueError(f"{found} is not a complete model folder (no {folder.MARK})")
        print(f"{found} does not exist: this run can train, but not sample; name the encoders' folder with --model")
        return
    differing = [name for name, digest in encoders.digests(found).items() if samples.fingerprint.get(name) != digest]
    if differing:
        raise ValueError(f"{differing} of {found} did not make the samples in {samples.folder}; see --model")
    if not made:
        models.adopt(found, model)
    if not checkpoint.steps(out / runs.CHECKPOINTS):  # nothing is trained yet: the config may still change
        models.finish(model, transformer_config(config, samples), Shift(**config.timesteps.shift))


def check_samples(config: Any, samples: Cache) -> None:
    """Checks that a config's `data` group describes encoded samples.

    Raises:
      ValueError: if they were prepared in another way, or lack a stream that has a share.
    """
    check_fingerprint(samples.folder, samples.fingerprint, encode.preprocessing(config.data))
    streams_of(samples, shares_of(config.data))


def train_transformer(config: Any, samples: Cache, out: pathlib.Path) -> None:
    """Trains the transformer on encoded samples; continues where an earlier call stopped.

    Args:
      config: with the groups `data` and `transformer`.

    Raises:
      ValueError: if the samples were prepared in another way than `config.data` says, or lack a stream that it asks
        for, and as `loop.train`.
    """
    check_samples(config, samples)
    data, config = config.data, config.transformer
    mesh, model_config = mesh_of(config.mesh), transformer_config(config, samples)
    run = Execution(
        dtype_of(config.execution.dtype),
        sharding.Attention(mesh, config.execution.kernel),
        config.execution.remat,
        sharding.Constrain(mesh),
    )
    shift = Shift(**config.timesteps.shift)
    to_batch, prepare = text_source(config, samples, out / runs.MODEL, mesh)
    mixture = Mixture.of_cache(
        samples,
        shares_of(data),
        config.batch_sizes,
        seed=config.seed,
        dropout=config.dropout,
        own_rows=lambda size: sharding.own_rows(mesh, size),
    )
    if unused := mixture.unused(samples):
        print(f"data.mixture gives no steps to these samples (side-conditions: number): {unused}")

    def batches(start: int) -> Iterator[loop.Feed]:
        for stream, rows in mixture.from_step(start):
            loader = stream.loader
            facts = {f"batch/{name}": value for name, value in rows.composition.items()}
            facts["batch/side"], facts["batch/conditions"] = map(float, stream.name.split("-"))
            yield loop.Feed(loader.layout, to_batch(loader.layout, rows), loader.batch_size, facts)

    validate = transformer_training.make_validation(shift, run, config.seed + 1)
    held = {
        stream.name: [
            (layout, prepare(layout, sharding.put_batch(mesh, to_batch(layout, rows), stream.loader.batch_size)))
            for layout, rows in _held_rows(stream, config.validation_samples, mesh)
        ]
        for stream in mixture.streams
    }

    def evaluate(state: Any) -> dict[str, float]:
        losses = {f"validation_loss/{name}": validate(state.ema, kept) for name, kept in held.items()}
        return {"validation_loss": float(np.mean(list(losses.values()))), **(losses if len(losses) > 1 else {})}

    task = loop.Task(
        "transformer",
        lambda key: MMDiT(model_config, key=key),
        transformer_training.make_loss(_law(config), shift, run),
        batches,
        samples.fingerprint,
        evaluate,
        prepare,
    )
    loop.train(task, config, out, mesh)


def text_source(config: Any, samples: Cache, model: pathlib.Path, mesh: Mesh) -> tuple[Any, Any]:
    """How rows become batches: on the host, and then on the mesh, where text features may have to be computed."""
    if samples.fingerprint.get("text") != encode.ONLINE:
        return lambda _, rows: to_batch(rows), lambda _, batch: batch
    if not (model / "text_encoder").is_dir():
        raise ValueError(f"{samples.folder} holds prompts, not features: name the encoders' folder with --model")
    dtype = dtype_of(samples.fingerprint["dtype"])
    encoder = encoders.load(model, "text_encoder", mesh, dtype)
    processor = PromptProcessor.from_folder(
        model / "processor", components.read_config(model / "text_encoder", "text_encoder")
    )
    kernel = sharding.Attention(mesh, config.execution.kernel)

    def with_prompts(layout: Layout, rows: Rows) -> Any:
        return to_batch(rows), online.prompt_rows(processor, layout, rows)

    def with_features(_: Layout, both: Any) -> transformer_training.Batch:
        batch, prompts = both
        features = online.text_features(encoder, prompts, kernel=kernel)
        return batch._replace(given=batch.given._replace(text_BTE=features))

    return with_prompts, with_features


def to_batch(rows: Rows) -> transformer_training.Batch:
    """Loader rows as the transformer's batch."""
    given = Conditioning(rows.text_BTE, rows.positions_BS3, rows.valid_BS, rows.conditions_BMC)
    return transformer_training.Batch(rows.latents_BNC, given)


def _held_rows(stream: Stream, count: int, mesh: Mesh) -> Iterator[tuple[Layout, Rows]]:
    """The first samples of a stream in order, this process's rows: noise and times are what validation holds out."""
    loader = stream.loader
    for start in range(0, count, loader.batch_size):
        places = [(start + row) % len(loader.samples) for row in sharding.own_rows(mesh, loader.batch_size)]
        samples = (loader.samples[place] for place in places)
        yield loader.layout, collate(loader.layout, [Row(sample, sample.texts[0]) for sample in samples])
