"""First weights of an autoencoder without levels: the best linear code of its training images.

All residual branches of a fresh autoencoder end in zeros, so images pass it on its shortcuts. With principal components
of patches as its input convolution it is a linear code, up to the norm and the SiLU before each output. Two
least-squares fits through these give the output convolutions. Training starts with what a linear code can do and adds
what it cannot: context beyond the patch, and everything that is not linear.

A model with levels has no such weights: its decoder repeats rows and columns of the latents, and the convolutions after
that cannot tell the copies apart (docs/autoencoder.md).

Dims: `B` batch, `H` `W` pixels, `c` image channels, `P` patches, `D` values of a patch, `F` channels before an output,
`O` channels of an output.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jaxtyping import Float

from qi2_jax.models.vae import VAE, Decoder, Encoder, VAEConfig
from qi2_jax.models.vae_blocks import Conv2d, ResidualBlock, to_patches

# The norm before an output divides by one number if one channel is constant and this many times longer than all others
# together. SiLU adds up to the identity over a channel and its negative: silu(x) - silu(-x) = x.
OFFSET = 8.0
# Diffusion models see every latent channel with unit variance. With principal components as channels, an error of the
# brightness would count no more than one of the finest detail, and samples would show the patches. So latents are
# rotated components whose standard deviations are to this power of those in the image.
SPECTRUM = 0.25
RIDGE = 1e-6  # added to the covariance of features, in units of their mean variance
MIN_DEVIATION = 1e-3  # components that vary less are noise and not scaled up further; pixels are in [-1, 1]
LOGVAR = -10.0  # log variance of the posterior


def check(config: VAEConfig) -> None:
    """Raises a ValueError if an autoencoder of this shape cannot start as a linear code."""
    widths = config.encoder_width * config.multipliers[-1], config.decoder_width * config.multipliers[-1]
    values = config.in_channels * config.patch_size**2
    if config.halves_time or min(widths) <= 2 * config.latent_channels or values < config.latent_channels:
        raise ValueError(
            f"linear_start is on, but the model has {len(config.multipliers)} levels, {widths[0]} and {widths[1]} "
            f"channels before the outputs of encoder and decoder, and {values} values in a patch; a linear start needs "
            f"one level (patch_size=16 for a factor of 16), more than {2 * config.latent_channels} channels, and at "
            f"least {config.latent_channels} values"
        )


def start_linear(vae: VAE, batches: Sequence[Float[np.ndarray, "B H W c"]]) -> None:
    """Sets the weights that make a fresh autoencoder a linear code; all others stay random.

    Args:
      vae: autoencoder that `check` accepts, changed in place.
      batches: images in [-1, 1] on which the code is fitted.
    """
    encoder, decoder, channels = vae.encoder, vae.decoder, vae.config.latent_channels
    patches = [_rows(to_patches(batch, vae.config.patch_size)) for batch in batches]

    weight_DF, bias_F, deviation_F = _whitening(patches, width=encoder.conv_in.bias.shape[0] - channels - 1)
    _set(encoder.conv_in, _signed(weight_DF, channels), _signed(bias_F, channels))
    _straighten(encoder, encoder.mid_block.resnets[1], _ENCODED(encoder, batches[0]), channels)
    codes = (patches_PD @ weight_DF[:, :channels] + bias_F[:channels] for patches_PD in patches)
    weight_FO, bias_O = _least_squares((_rows(_ENCODER_FEATURES(encoder, batch)) for batch in batches), codes)
    unused_FO = np.zeros_like(weight_FO)
    _set(encoder.conv_out, np.concatenate([weight_FO, unused_FO], 1), np.append(bias_O, np.full(channels, LOGVAR)))
    mixing_CC = _mixing(deviation_F[:channels])
    _set(vae.quant_conv, scipy.linalg.block_diag(mixing_CC, np.eye(channels)), np.zeros(2 * channels))

    _set(vae.post_quant_conv, np.linalg.inv(mixing_CC), np.zeros(channels))
    # Channels beyond those of the latents start as random mixtures of them.
    mixture_CF = np.asarray(decoder.conv_in.weight[..., 1, 1], np.float64).T
    mixture_CF = mixture_CF[:, channels + 1 :] / np.linalg.norm(mixture_CF[:, channels + 1 :], axis=0)
    mixture_CF[:, :channels] = np.eye(channels)
    _set(decoder.conv_in, _signed(mixture_CF, channels), np.zeros(mixture_CF.shape[1] + channels + 1))
    inputs = [_DECODER_INPUT(vae, batch) for batch in batches]
    _straighten(decoder, decoder.up_blocks[-1].resnets[-1], _DECODED(decoder, inputs[0]), channels)
    features = (_rows(_DECODER_FEATURES(decoder, batch)) for batch in inputs)
    _set(decoder.conv_out, *_least_squares(features, patches))


def _signed(values: np.ndarray, channels: int) -> np.ndarray:
    """Appends the negatives of the first channels, and one empty channel."""
    first = values[..., :channels]
    return np.concatenate([values, -first, np.zeros_like(first[..., :1])], axis=-1)


def _straighten(end: Encoder | Decoder, last: ResidualBlock, activations: Any, channels: int) -> None:
    """Makes the norm before an output nearly a constant factor, by the constant last channel."""
    width = activations.shape[-1]
    constant = OFFSET * width**0.5 * float(jnp.std(activations[..., :-1]))
    scale = constant / width**0.5 / max(float(jnp.std(activations[..., :channels])), MIN_DEVIATION)
    last.conv2.bias[...] = last.conv2.bias[...].at[-1].set(constant)
    gamma = jnp.full(width, scale).at[-1].set(width**-0.5)
    end.norm_out.gamma[...] = gamma.reshape(end.norm_out.gamma.shape)


def _encoded(encoder: Encoder, images: Any) -> Any:
    return encoder.mid_block(encoder.levels(images))


def _decoded(decoder: Decoder, inputs: Any) -> Any:
    x = decoder.head(inputs)
    for block in decoder.up_blocks:
        x = block(x)
    return x


_DECODER_INPUT = jax.jit(lambda vae, images: vae.post_quant_conv(vae.encode(images).mean))
_ENCODED, _DECODED = jax.jit(_encoded), jax.jit(_decoded)
_ENCODER_FEATURES = jax.jit(lambda encoder, images: jax.nn.silu(encoder.norm_out(_encoded(encoder, images))))
_DECODER_FEATURES = jax.jit(lambda decoder, inputs: jax.nn.silu(decoder.norm_out(_decoded(decoder, inputs))))


def _mixing(deviation_C: np.ndarray) -> np.ndarray:
    """The matrix that makes whitened components latents, see `SPECTRUM`; the mean variance of these is 1."""
    size = len(deviation_C)
    rotation_CC = np.linalg.qr(np.random.default_rng(0).normal(size=(size, size)))[0]
    scale_C = deviation_C**SPECTRUM
    return (scale_C / np.sqrt(np.mean(scale_C**2)))[:, None] * rotation_CC


def _whitening(patches: Sequence[np.ndarray], width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A projection to principal components of unit variance, the largest ones first.

    Returns:
      Its weight [D, width], its bias, and the standard deviations that the components have in the patches.
    """
    mean_D, covariance_DD = _moments(patches)
    D = len(mean_D)
    variance_F, basis_DF = scipy.linalg.eigh(covariance_DD, subset_by_index=(max(0, D - width), D - 1))
    deviation_F = np.maximum(np.sqrt(np.maximum(variance_F, 0)), MIN_DEVIATION)
    weight_DF = np.pad((basis_DF / deviation_F)[:, ::-1], ((0, 0), (0, max(0, width - D))))
    return weight_DF, -(mean_D @ weight_DF), deviation_F[::-1]


def _least_squares(features: Iterable[np.ndarray], targets: Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Weight [F, O] and bias [O] of the linear map from features to targets with the smallest squared error."""
    features, targets = list(features), list(targets)
    F = features[0].shape[1]
    mean, covariance = _moments([np.concatenate(pair, axis=1) for pair in zip(features, targets, strict=True)])
    within_FF, across_FO = covariance[:F, :F], covariance[:F, F:]
    ridge_FF = RIDGE * max(np.trace(within_FF) / F, MIN_DEVIATION**2) * np.eye(F)
    weight_FO = scipy.linalg.solve(within_FF + ridge_FF, across_FO, assume_a="pos")
    return weight_FO, mean[F:] - mean[:F] @ weight_FO


def _moments(rows: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of rows."""
    count = sum(map(len, rows))
    mean = sum(part.sum(axis=0) for part in rows) / count
    return mean, sum((part - mean).T @ (part - mean) for part in rows) / count


def _rows(grid: Any) -> np.ndarray:
    """[B, h, w, C] as rows of fp64 values."""
    return np.asarray(grid, np.float64).reshape(-1, grid.shape[-1])


def _set(conv: Conv2d, weight_FO: np.ndarray, bias_O: np.ndarray) -> None:
    """Makes a convolution a linear map of each position alone."""
    weight = np.zeros(conv.weight.shape)
    centre = conv.weight.shape[-1] // 2
    weight[:, :, centre, centre] = weight_FO.T
    conv.weight[...] = jnp.asarray(weight, jnp.float32)
    conv.bias[...] = jnp.asarray(bias_O, jnp.float32)
