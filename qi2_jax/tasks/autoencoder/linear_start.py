"""First weights of an autoencoder without levels: the best linear code of its training images.

All residual branches of a fresh autoencoder end in zeros, so images pass it on its shortcuts. With principal components
of patches as its input convolution it is a linear code, up to the norm and the SiLU before each output. Two
least-squares fits through these give the output convolutions. That of the decoder sees the neighbours of a latent,
which tell more about a patch than its own components. Training starts there and adds everything that is not linear.

The components and their negatives take twice as many channels as the latents have. They are much larger than the other
channels, and what training adds to them in the same steps changes them little. Otherwise the first updates would spoil
the code sooner than they improve on it.

A model with levels has no such weights: its decoder repeats rows and columns of the latents, and the convolutions after
that cannot tell the copies apart (docs/autoencoder.md).

Dims: `B` batch, `H` `W` pixels, `c` image channels, `P` patches, `D` values of a patch, `F` channels before an output,
`O` channels of an output, `T` positions that a convolution sees.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jaxtyping import Float

from qi2_jax.evaluation import linear_code
from qi2_jax.models.vae import VAE, Decoder, Encoder, VAEConfig
from qi2_jax.models.vae_blocks import Conv2d, ResidualBlock, to_patches

# The norm before an output divides by one number if one channel is constant and this many times longer than all others
# together. SiLU adds up to the identity over a channel and its negative: silu(x) - silu(-x) = x.
OFFSET = 8.0
# Components are this many times larger than the other channels of the residual stream, and this many times smaller
# before the output convolutions, whose weights for them are larger instead.
STREAM_SCALE = 16.0
OUTPUT_SCALE = 8.0
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

    def patches() -> Iterator[np.ndarray]:
        return (_rows(to_patches(batch, vae.config.patch_size)) for batch in batches)

    weight_DF, bias_F, deviation_F = _whitening(patches(), width=encoder.conv_in.bias.shape[0] - channels - 1)
    codes = (patches_PD @ weight_DF[:, :channels] + bias_F[:channels] for patches_PD in patches())
    _set(encoder.conv_in, _signed(weight_DF, channels), _signed(bias_F, channels))
    _straighten(encoder, encoder.mid_block.resnets[1], _ENCODED(encoder, batches[0]), channels)
    features = (_rows(_components(_ENCODER_FEATURES(encoder, batch), channels)) for batch in batches)
    weight_FO, bias_O = _least_squares(features, codes)
    unused_FO = np.zeros_like(weight_FO)
    weight_FO, bias_O = np.concatenate([weight_FO, unused_FO], 1), np.append(bias_O, np.full(channels, LOGVAR))
    _set(encoder.conv_out, _for_components(weight_FO, encoder.conv_out, channels), bias_O)
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
    features = (_neighbourhoods(_components(_DECODER_FEATURES(decoder, batch), channels)) for batch in inputs)
    weight_FO, bias_O = _least_squares(features, patches())
    _set(decoder.conv_out, _for_components(weight_FO, decoder.conv_out, channels), bias_O)


def _signed(values: np.ndarray, channels: int) -> np.ndarray:
    """Scales the first channels up, and appends their negatives and one empty channel."""
    first, others = STREAM_SCALE * values[..., :channels], values[..., channels:]
    return np.concatenate([first, others, -first, np.zeros_like(first[..., :1])], axis=-1)


def _straighten(end: Encoder | Decoder, last: ResidualBlock, activations: Any, channels: int) -> None:
    """Balances channels of different scale in all norms, and makes that before the output nearly a constant factor.

    The constant last channel does the latter.
    """
    width = activations.shape[-1]
    factors = np.ones(width)
    factors[channels : width - channels - 1] = STREAM_SCALE
    levels = end.down_blocks if isinstance(end, Encoder) else end.up_blocks
    blocks = [*end.mid_block.resnets, *(block for level in levels for block in level.resnets)]
    for norm in (*(block.norm1 for block in blocks), *(block.norm for block in end.mid_block.attentions)):
        norm.gamma[...] = jnp.asarray(factors, jnp.float32).reshape(norm.gamma.shape)

    constant = OFFSET * width**0.5 * float(jnp.std(activations[..., :-1]))
    scale = constant / width**0.5 / max(float(jnp.std(activations[..., :channels])), MIN_DEVIATION)
    last.conv2.bias[...] = last.conv2.bias[...].at[-1].set(constant)
    gamma = scale * np.where(factors == 1, 1 / OUTPUT_SCALE, factors)
    gamma[-1] = width**-0.5
    end.norm_out.gamma[...] = jnp.asarray(gamma, jnp.float32).reshape(end.norm_out.gamma.shape)


def _components(features: Any, channels: int) -> Any:
    """What SiLU leaves of the components: the difference between each and its negative."""
    return features[..., :channels] - features[..., -channels - 1 : -1]


def _for_components(weight_FO: np.ndarray, conv: Conv2d, channels: int) -> np.ndarray:
    """Weights for all channels from those for the differences of `_components`, at each of T positions."""
    outputs, width = conv.weight.shape[:2]
    weight_TCO = weight_FO.reshape(-1, channels, outputs)
    others_TFO = np.zeros((len(weight_TCO), width - 2 * channels - 1, outputs))
    weight_TFO = np.concatenate([weight_TCO, others_TFO, -weight_TCO, np.zeros_like(weight_TCO[:, :1])], axis=1)
    return weight_TFO.reshape(-1, outputs)


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


def _whitening(patches: Iterable[np.ndarray], width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A projection to principal components of unit variance, the largest ones first.

    Returns:
      Its weight [D, width], its bias, and the standard deviations that the components have in the patches.
    """
    moments = linear_code.moments(patches)
    variance_F, basis_DF = moments.principal_components(width)
    deviation_F = np.maximum(np.sqrt(np.maximum(variance_F, 0)), MIN_DEVIATION)
    weight_DF = np.pad(basis_DF / deviation_F, ((0, 0), (0, width - len(variance_F))))
    return weight_DF, -(moments.mean @ weight_DF), deviation_F


def _least_squares(features: Iterable[np.ndarray], targets: Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Weight [F, O] and bias [O] of the linear map from features to targets with the smallest squared error."""
    F = 0

    def pairs() -> Iterator[np.ndarray]:
        nonlocal F
        for part, target in zip(features, targets, strict=True):
            F = part.shape[1]
            yield np.concatenate([part, target], axis=1)

    moments = linear_code.moments(pairs())
    mean, covariance = moments.mean, moments.covariance
    within_FF, across_FO = covariance[:F, :F], covariance[:F, F:]
    ridge_FF = RIDGE * max(np.trace(within_FF) / F, MIN_DEVIATION**2) * np.eye(F)
    weight_FO = scipy.linalg.solve(within_FF + ridge_FF, across_FO, assume_a="pos")
    return weight_FO, mean[F:] - mean[:F] @ weight_FO


def _rows(grid: Any) -> np.ndarray:
    """[B, h, w, C] as rows of fp64 values."""
    return np.asarray(grid, np.float64).reshape(-1, grid.shape[-1])


def _neighbourhoods(grid: Any) -> np.ndarray:
    """[B, h, w, C] as rows of what a convolution of kernel 3 sees at each position, in the order (row, column, C)."""
    B, h, w, C = grid.shape
    padded = np.pad(np.asarray(grid, np.float64), ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = [padded[:, row : row + h, column : column + w] for row in range(3) for column in range(3)]
    return np.concatenate(windows, axis=-1).reshape(B * h * w, 9 * C)


def _set(conv: Conv2d, weight_FO: np.ndarray, bias_O: np.ndarray) -> None:
    """Makes a convolution a linear map of each position, or of each neighbourhood if the weight has 9 x C rows."""
    outputs, inputs, kernel, _ = conv.weight.shape
    weight = np.zeros(conv.weight.shape)
    if len(weight_FO) == inputs:
        weight[:, :, kernel // 2, kernel // 2] = weight_FO.T
    else:
        weight[:] = weight_FO.T.reshape(outputs, kernel, kernel, inputs).transpose(0, 3, 1, 2)
    conv.weight[...] = jnp.asarray(weight, jnp.float32)
    conv.bias[...] = jnp.asarray(bias_O, jnp.float32)
