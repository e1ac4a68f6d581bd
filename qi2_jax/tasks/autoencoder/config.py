"""The autoencoder's config."""

from typing import Any

from qi2_jax.config import loading as configs
from qi2_jax.models.vae import VAEConfig
from qi2_jax.tasks import keys
from qi2_jax.tasks.autoencoder import objective as vae_training
from qi2_jax.tasks.stages import check_training


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
    check_training("vae", vae, (vae.batch_size,))
    return model
