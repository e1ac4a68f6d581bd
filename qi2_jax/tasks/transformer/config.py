"""The transformer's config."""

from typing import Any

import jax

from data_pipeline.loading.mixture import Shares, streams_of
from data_pipeline.samples import encoding
from data_pipeline.samples.cache import Cache, check_fingerprint
from data_pipeline.samples.held_out import check_held_out
from qi2_jax import attention, sharding
from qi2_jax.config import loading as configs
from qi2_jax.diffusion.timesteps import LAWS, Shift, TimestepLaw
from qi2_jax.models import lora
from qi2_jax.models.lora import LoRAConfig
from qi2_jax.models.mmdit import MMDiT, MMDiTConfig
from qi2_jax.tasks import keys
from qi2_jax.tasks.stages import check_training, dtype_of, mesh_of
from qi2_jax.tasks.transformer import fixed_prompts
from qi2_jax.training import loop


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
    check_training("transformer", config, config.batch_sizes)
    sharding.left_whole(like, mesh_of(config.mesh))


def lora_of(config: Any) -> LoRAConfig | None:
    """The adapter that a transformer stage trains, None if it trains the whole model.

    Raises:
      ValueError: for a value that no adapter can have.
    """
    return LoRAConfig(config.lora.rank, config.lora.alpha, tuple(config.lora.targets)) if config.lora.rank else None


def law_of(config: Any) -> TimestepLaw:
    """The timestep law, with the arguments of its own group in the config."""
    if config.timesteps.law not in LAWS:
        raise ValueError(f"timesteps.law {config.timesteps.law!r} is unknown; choose one of {sorted(LAWS)}")
    return LAWS[config.timesteps.law](**config.timesteps[config.timesteps.law])


def transformer_config(config: Any, samples: Cache) -> MMDiTConfig:
    """The transformer's configuration, with the widths that the encoded samples have."""
    sample = samples.streams[0][0]
    return MMDiTConfig(
        **configs.dataclass_fields(config.model),
        latent_channels=sample.latents.shape[-1] or samples.fingerprint["latent_channels"],
        text_width=sample.texts[0].features.shape[-1] or samples.fingerprint["text_width"],
    )


def check_samples(config: Any, samples: Cache) -> None:
    """Checks that a config's `data` group describes encoded samples.

    Raises:
      ValueError: if they were prepared in another way, or lack a stream that has a share.
    """
    check_fingerprint(samples.folder, samples.fingerprint, encoding.preprocessing(config.data))
    streams_of(samples, shares_of(config.data))
