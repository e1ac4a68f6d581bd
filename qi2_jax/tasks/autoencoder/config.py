"""The autoencoder's config."""

import dataclasses

from qi2_jax.config.fields import check_at_least, check_one_of
from qi2_jax.models.vae import VAEConfig
from qi2_jax.tasks.autoencoder.objective import ERRORS
from qi2_jax.tasks.stages import check_batch_sizes
from qi2_jax.training.config import TrainingConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoencoderConfig(TrainingConfig):
    """Config of a run that trains the autoencoder.

    Attributes:
      model: shape of the autoencoder.
      crop: side of the square crops on which it trains, in pixels.
      loss: error of the reconstruction, "absolute" or "squared".
      batch_size: crops per batch.
      statistics_batches: batches from which the mean and standard deviation of the latents are measured.
      channels: channels of the training images, 3 (RGB) or 4 (RGBA); the curriculum reads it.
      mattes: share of training crops that a random matte makes partly transparent, for an autoencoder of RGBA images.

    Raises:
      ValueError: for a value out of its range.
    """

    model: VAEConfig
    crop: int
    loss: str
    batch_size: int
    statistics_batches: int
    channels: int = 4
    mattes: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_one_of(self, "loss", ERRORS)
        check_at_least(self, statistics_batches=1)
        if self.crop < 1 or self.crop % self.model.factor:
            raise ValueError(
                f"crop is {self.crop}; it must be a multiple of {self.model.factor}, the pixels of a latent"
            )
        if not 0 <= self.mattes <= 1 or (self.mattes and self.model.in_channels != 4):
            raise ValueError(
                f"mattes is {self.mattes}; it is a share of crops from 0 to 1, and above 0 the autoencoder must read "
                f"four channels instead of {self.model.in_channels}"
            )


def check_autoencoder(config: AutoencoderConfig) -> None:
    """Raises a ValueError if the devices of this job cannot train the autoencoder with this config."""
    check_batch_sizes("vae", config.mesh, (config.batch_size,))
