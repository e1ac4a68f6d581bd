"""The image autoencoder of Qwen-Image-2: 16 x 16 pixels of 3 or 4 channels to one latent of 64 channels, and back.

Encoder and decoder are residual autoencoders after DC-AE (arXiv 2410.10733) with a mid block that attends over all
positions. Both take and return [B, H, W, C], and compute in the dtype of their input with norms and softmax in fp32.

Dims: `B` batch, `H` `W` height and width of images, `h` `w` of latents, `I` image channels, `C` latent channels.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from qi2_jax.models.layers import AnyArray, keys
from qi2_jax.models.vae_blocks import (
    ChannelNorm,
    Conv2d,
    DownBlock,
    MidBlock,
    UpBlock,
    from_patches,
    recomputed,
    to_patches,
)

LOGVAR_RANGE = (-30.0, 20.0)  # keeps exp(logvar) finite and above zero

# Standard deviation of the initial bias of input convolutions. With zero biases, a zero image would have zero
# activations, at which the channel norms multiply gradients by 1e12.
INPUT_BIAS_STD = 0.5


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """Architecture of an autoencoder; the defaults are the published one (78.7M and 259.0M parameters).

    Attributes:
      encoder_width, decoder_width: channels of the level with the highest resolution.
      latent_channels: channels of a latent.
      multipliers: channels of each level, highest resolution first, in units of the width. All levels but the last
        halve height and width.
      residual_blocks: residual blocks of a level of the encoder; a level of the decoder has one more.
      halves_time: for every level but the last, whether the published video ancestor also halves time there. It
        decides what the level's shortcut averages, also for an image.
      in_channels, out_channels: channels of the input and output images: 3 (RGB) or 4 (RGBA).
      patch_size: side of the squares of pixels that become the channels of one position before the first level, and
        after the last one. The published model has 1; small models with 4 are many times cheaper.
      latents_mean, latents_std: statistics of latents over a corpus, one value per latent channel; None: 0 and 1.

    Raises:
      ValueError: for values that do not describe a valid autoencoder.
    """

    encoder_width: int = 96
    decoder_width: int = 144
    latent_channels: int = 64
    multipliers: tuple[int, ...] = (1, 2, 4, 8, 8)
    residual_blocks: int = 2
    halves_time: tuple[bool, ...] = (False, True, True, True)
    in_channels: int = 4
    out_channels: int = 4
    patch_size: int = 1
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        names = ("encoder_width", "decoder_width", "latent_channels", "residual_blocks", "patch_size")
        for name in names:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be positive")
        if not self.multipliers or min(self.multipliers) < 1:
            raise ValueError(f"multipliers are {self.multipliers}; give a positive one for each level")
        if len(self.halves_time) != len(self.multipliers) - 1:
            raise ValueError(
                f"halves_time {self.halves_time} has {len(self.halves_time)} flags; multipliers {self.multipliers} "
                f"need {len(self.multipliers) - 1}, one for every level but the last"
            )
        for name in ("in_channels", "out_channels"):
            if getattr(self, name) not in (3, 4):
                raise ValueError(f"{name} is {getattr(self, name)}; give 3 (RGB) or 4 (RGBA)")
        for name in ("latents_mean", "latents_std"):
            values = getattr(self, name)
            if values is not None and len(values) != self.latent_channels:
                raise ValueError(
                    f"{name} has {len(values)} values; give one for each of {self.latent_channels} channels"
                )
            if values is not None and not all(map(math.isfinite, values)):
                raise ValueError(f"{name} has values that are not finite: {values}")
        if self.latents_std is not None and min(self.latents_std) <= 0:
            raise ValueError(f"latents_std has the value {min(self.latents_std)}; all must be positive")
        # The decoder's last level has no shortcut; all other shortcuts need whole groups of channels.
        shortcuts = [(level.in_dim, level.out_dim, level) for level in self.encoder_levels()]
        shortcuts += [(level.out_dim, level.in_dim, level) for level in self.decoder_levels()[:-1]]
        for many, few, level in shortcuts:
            if many * level.frames * level.factor**2 % few:
                raise ValueError(
                    f"multipliers {self.multipliers} ask for a level from {level.in_dim} to {level.out_dim} channels, "
                    "for which no shortcut exists; let every multiplier be equal to or twice the one before it, and "
                    "the last two be equal"
                )

    @property
    def factor(self) -> int:
        """Pixels per latent along height and width."""
        return self.patch_size * 2 ** len(self.halves_time)

    def encoder_levels(self) -> list["Level"]:
        """Levels of the encoder in the order of computation."""
        return _levels(self.encoder_width, (1, *self.multipliers), self.halves_time)

    def decoder_levels(self) -> list["Level"]:
        """Levels of the decoder in the order of computation."""
        reverse = self.multipliers[::-1]
        return _levels(self.decoder_width, (reverse[0], *reverse), self.halves_time[::-1])


class Level(NamedTuple):
    """Channels in and out of a level, its scale factor for height and width, and for frames in the video ancestor."""

    in_dim: int
    out_dim: int
    factor: int
    frames: int


def _levels(width: int, multipliers: tuple[int, ...], halves_time: tuple[bool, ...]) -> list[Level]:
    dims = [width * multiplier for multiplier in multipliers]
    factors, frames = [2] * len(halves_time) + [1], [1 + flag for flag in halves_time] + [1]
    return [Level(*level) for level in zip(dims[:-1], dims[1:], factors, frames, strict=True)]


class Posterior(NamedTuple):
    """Normal distribution of latents with this mean and log variance, each [B, h, w, C]."""

    mean: Float[Array, "B h w C"]
    logvar: Float[Array, "B h w C"]


class Encoder(nnx.Module):
    """Encodes images to 2 C channels, the input of `VAE.quant_conv`."""

    def __init__(self, config: VAEConfig, *, key: Array):
        rng = keys(key)
        levels = config.encoder_levels()
        self.conv_in = Conv2d(
            config.in_channels * config.patch_size**2, levels[0].in_dim, 3, key=next(rng), bias_std=INPUT_BIAS_STD
        )
        self.patch_size = config.patch_size
        self.down_blocks = nnx.List([DownBlock(*level, config.residual_blocks, key=next(rng)) for level in levels])
        self.mid_block = MidBlock(levels[-1].out_dim, key=next(rng))
        self.norm_out = ChannelNorm(levels[-1].out_dim)
        self.conv_out = Conv2d(levels[-1].out_dim, 2 * config.latent_channels, 3, key=next(rng))

    def __call__(self, x: Float[AnyArray, "B H W I"], *, remat_levels: int) -> Float[Array, "B h w _"]:
        return self.head(self.levels(x, remat_levels), remat=remat_levels >= len(self.down_blocks))

    def levels(self, x: Float[AnyArray, "B H W I"], remat_levels: int = 0) -> Float[Array, "B h w _"]:
        """The part before the mid block, in which every pixel sees a limited neighbourhood."""
        x = self.conv_in(to_patches(x, self.patch_size))
        for number, block in enumerate(self.down_blocks):
            x = block(x, remat=number < remat_levels)
        return x

    def head(self, x: Float[Array, "B h w _"], *, remat: bool = False) -> Float[Array, "B h w _"]:
        """The mid block, which attends over all positions, and the output."""
        x = recomputed(self.mid_block, remat)(x)
        return self.conv_out(jax.nn.silu(self.norm_out(x)))


class Decoder(nnx.Module):
    """Decodes the output of `VAE.post_quant_conv` to images with unbounded values."""

    def __init__(self, config: VAEConfig, *, key: Array):
        rng = keys(key)
        levels = config.decoder_levels()
        self.conv_in = Conv2d(config.latent_channels, levels[0].in_dim, 3, key=next(rng), bias_std=INPUT_BIAS_STD)
        self.mid_block = MidBlock(levels[0].in_dim, key=next(rng))
        self.up_blocks = nnx.List([UpBlock(*level, config.residual_blocks + 1, key=next(rng)) for level in levels])
        self.norm_out = ChannelNorm(levels[-1].out_dim)
        self.conv_out = Conv2d(levels[-1].out_dim, config.out_channels * config.patch_size**2, 3, key=next(rng))
        self.patch_size = config.patch_size

    def __call__(self, x: Float[Array, "B h w C"], *, remat_levels: int) -> Float[Array, "B H W I"]:
        return self.levels(self.head(x, remat=remat_levels >= len(self.up_blocks)), remat_levels)

    def head(self, x: Float[Array, "B h w C"], *, remat: bool = False) -> Float[Array, "B h w _"]:
        """The input and the mid block, which attends over all positions."""
        x = self.conv_in(x)
        return recomputed(self.mid_block, remat)(x)

    def levels(self, x: Float[Array, "B h w _"], remat_levels: int = 0) -> Float[Array, "B H W I"]:
        """The part after the mid block, in which every pixel sees a limited neighbourhood."""
        for number, block in enumerate(self.up_blocks):
            x = block(x, remat=len(self.up_blocks) - number <= remat_levels)
        return recomputed(self.output, remat_levels > 0)(x)

    def output(self, x: Float[Array, "B h w _"]) -> Float[Array, "B H W I"]:
        """The layers after the levels."""
        return from_patches(self.conv_out(jax.nn.silu(self.norm_out(x))), self.patch_size)


class VAE(nnx.Module):
    """Image autoencoder; a square of `config.factor` pixels becomes one latent.

    In the `remat_levels` levels of encoder and decoder that have the highest resolution, the backward pass keeps only
    the inputs of blocks and computes these again, one by one; if that is all levels, also the mid blocks.
    """

    def __init__(self, config: VAEConfig, *, key: Array):
        rng = keys(key)
        self.config = config
        self.encoder = Encoder(config, key=next(rng))
        self.quant_conv = Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1, key=next(rng))
        self.post_quant_conv = Conv2d(config.latent_channels, config.latent_channels, 1, key=next(rng))
        self.decoder = Decoder(config, key=next(rng))

    @jax.named_scope("vae/encode")
    def encode(self, images: Float[AnyArray, "B H W I"], *, remat_levels: int = 0) -> Posterior:
        """The distribution of the raw latents of images in [-1, 1], in the dtype of the images; its mode is the mean.

        Raises:
          ValueError: if height or width is not a multiple of `config.factor`, or for a wrong number of channels.
        """
        config = self.config
        _, H, W, I = images.shape
        if H % config.factor or W % config.factor:
            raise ValueError(f"images are {H} x {W} pixels; resize both to multiples of {config.factor}")
        if config.in_channels != I:
            raise ValueError(f"images have {I} channels; this encoder takes {config.in_channels}")
        return self.posterior(self.encoder(images, remat_levels=remat_levels))

    def posterior(self, encoded: Float[Array, "B h w _"]) -> Posterior:
        """The distribution that the encoder's output stands for."""
        mean, logvar = jnp.split(self.quant_conv(encoded), 2, axis=-1)
        return Posterior(mean, jnp.clip(logvar, *LOGVAR_RANGE))

    @jax.named_scope("vae/decode")
    def decode(
        self, latents: Float[Array, "B h w C"], *, clamp: bool = True, remat_levels: int = 0
    ) -> Float[Array, "B H W I"]:
        """Decodes raw latents to images in [-1, 1], in the dtype of the latents.

        `clamp=False` leaves values outside the range as they are. Training needs this, because a clamped value has no
        gradient.

        Raises:
          ValueError: for a wrong number of channels.
        """
        if latents.shape[-1] != self.config.latent_channels:
            raise ValueError(
                f"latents have {latents.shape[-1]} channels; this decoder takes {self.config.latent_channels}"
            )
        images = self.decoder(self.post_quant_conv(latents), remat_levels=remat_levels)
        return jnp.clip(images, -1.0, 1.0) if clamp else images

    def normalize(self, latents: Float[AnyArray, "... C"]) -> Float[Array, "... C"]:
        """Scales raw latents to zero mean and unit variance per channel, for the diffusion model."""
        mean_C, std_C = self._statistics()
        return ((latents.astype(jnp.float32) - mean_C) / std_C).astype(latents.dtype)

    def denormalize(self, latents: Float[AnyArray, "... C"]) -> Float[Array, "... C"]:
        """Inverse of `normalize`; returns the input of `decode`."""
        mean_C, std_C = self._statistics()
        return (latents.astype(jnp.float32) * std_C + mean_C).astype(latents.dtype)

    def _statistics(self) -> tuple[Float[Array, " C"], Float[Array, " C"]]:
        C = self.config.latent_channels
        mean, std = self.config.latents_mean, self.config.latents_std
        return (
            jnp.zeros(C) if mean is None else jnp.array(mean, jnp.float32),
            jnp.ones(C) if std is None else jnp.array(std, jnp.float32),
        )
