"""The module that training changes: the autoencoder, with the learned parts of its loss."""

import jax
from jaxtyping import Array

from qi2_jax.models.dinov2 import Dinov2
from qi2_jax.models.discriminator import PatchDiscriminator
from qi2_jax.models.layers import Linear
from qi2_jax.models.lpips import LPIPS
from qi2_jax.models.vae import VAE, VAEConfig
from qi2_jax.tasks.autoencoder.alignment import feature_channels
from qi2_jax.tasks.autoencoder.config import AutoencoderConfig


class TrainedVAE(VAE):
    """An autoencoder with the projection of the alignment and the discriminator of the adversarial phase.

    All other parameters have the names and initial values of a `VAE`, so what reads those ignores these two.

    Args:
      config: architecture of the autoencoder.
      features: channels to which latents are projected; 0: without projection.
      width: `adversarial.width` of the config; 0: without discriminator.
    """

    def __init__(self, config: VAEConfig, *, features: int = 0, width: int = 0, key: Array):
        super().__init__(config, key=key)
        keys = [jax.random.fold_in(key, number) for number in (1, 2)]
        self.projection = (
            Linear(config.latent_channels, features, key=keys[0], axes=("conv", None)) if features else None
        )
        self.discriminator = PatchDiscriminator(width, key=keys[1]) if width else None


def make_model(config: AutoencoderConfig, network: LPIPS | Dinov2 | None, key: Array) -> TrainedVAE:
    """The module that a run trains, with random parameters.

    Args:
      config: config of the run.
      network: network of the alignment; None: without alignment.
      key: random key.

    Raises:
      ValueError: if the network does not have the layer of the alignment.
    """
    features = feature_channels(network, config.alignment.layer) if network is not None else 0
    width = config.adversarial.width if config.adversarial.weight else 0
    return TrainedVAE(config.model, features=features, width=width, key=key)
