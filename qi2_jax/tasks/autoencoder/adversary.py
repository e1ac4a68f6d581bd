"""The adversarial phase: a discriminator sharpens what the decoder's head makes of latents that do not change any more.

As in DC-AE (arXiv 2410.10733), only the head is trained in this late phase, so the latents stay as they are, and a
discriminator cannot spoil what encoder and decoder have learned. The terms and their weight are those of VA-VAE
(arXiv 2501.01423, released code): with the logits D of patches,

    generator      = -mean D(reconstruction)
    discriminator  = (mean ReLU(1 - D(image)) + mean ReLU(1 + D(reconstruction))) / 2

and the generator's term is weighted such that its gradient at the decoder's last layer is `adversarial.weight` times
that of the reconstruction. One update trains both sides: each term is constant for the parameters of the other side.

Dims: `B` batch, `H` `W` pixels, `c` image channels, `O` output and `C` input channels of a convolution, `k` its kernel.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qi2_jax.models.layers import AnyArray
from qi2_jax.models.vae import VAEConfig
from qi2_jax.tasks.autoencoder.balance import ratio, with_gradient, with_last
from qi2_jax.tasks.autoencoder.trained_vae import TrainedVAE
from qi2_jax.training.step import IsTrained, Scalars

MAX_RATIO = 1e4  # of gradient norms, as in the released code
DISCRIMINATOR = "discriminator."  # beginning of the names of its parameters


def is_discriminator(name: str) -> bool:
    """Whether a parameter, by its dotted name, belongs to the discriminator."""
    return name.startswith(DISCRIMINATOR)


def trained_in_phase(config: VAEConfig, levels: int) -> IsTrained:
    """The parameters that the phase trains: those of the decoder's head and the discriminator.

    Args:
      config: architecture of the autoencoder.
      levels: `adversarial.levels` of the config.
    """
    count = len(config.multipliers)
    head = ("norm_out.", "conv_out.", *(f"up_blocks.{number}." for number in range(count - levels, count)))
    beginnings = (DISCRIMINATOR, *(f"decoder.{part}" for part in head))
    return lambda name: name.startswith(beginnings)


def hinge(real: Float[Array, "..."], fake: Float[Array, "..."]) -> Float[Array, ""]:
    """The discriminator's loss for its logits of images and of reconstructions."""
    return (jnp.mean(jax.nn.relu(1 - real)) + jnp.mean(jax.nn.relu(1 + fake))) / 2


def loss(
    vae: TrainedVAE,
    decode: Callable[[TrainedVAE], Float[Array, "B H W c"]],
    reconstruction: Callable[[Float[Array, "B H W c"]], tuple[Float[Array, ""], Scalars]],
    seen: Callable[[Float[AnyArray, "B H W c"]], Float[Array, "B H W 3"]],
    pixels_BHWc: Float[AnyArray, "B H W c"],
    weight: float,
) -> tuple[Float[Array, ""], Scalars]:
    """The reconstruction's loss plus the weighted generator's term, with metrics.

    The gradient for the discriminator is that of its own loss, which is a metric and not part of the value.
    Differentiation treats the weight of the generator's term as a constant.

    Args:
      vae: autoencoder with a discriminator.
      decode: decoding of the batch by an autoencoder.
      reconstruction: loss of reconstructed pixels, with metrics.
      seen: RGB that the discriminator sees of images or reconstructions.
      pixels_BHWc: images of the batch, in [-1, 1].
      weight: `adversarial.weight` of the config.
    """
    fixed, discriminator = jax.lax.stop_gradient, vae.discriminator
    assert discriminator is not None
    judge = fixed(discriminator)

    def generator(rebuilt_BHWc: Float[Array, "B H W c"]) -> Float[Array, ""]:
        return -jnp.mean(judge(seen(rebuilt_BHWc)))

    last = vae.decoder.conv_out.weight[...]
    rebuilt, to_last = jax.vjp(lambda last: decode(with_last(vae, "decoder", last)), last)
    (value, metrics), gradient = jax.value_and_grad(reconstruction, has_aux=True)(fixed(rebuilt))
    deceived, towards = jax.value_and_grad(generator)(fixed(rebuilt))
    factor = fixed(weight * ratio(to_last(gradient)[0], to_last(towards)[0], MAX_RATIO))
    total = with_gradient(value + factor * deceived, rebuilt, fixed(gradient + factor * towards))

    real, fake = discriminator(seen(pixels_BHWc)), discriminator(seen(fixed(rebuilt)))
    judged = hinge(real, fake)
    terms = {"generator": deceived, "discriminator": judged, "weight": factor}
    logits = {"real": jnp.mean(real), "fake": jnp.mean(fake)}
    metrics = {"reconstruction": value, **metrics}
    metrics |= {f"adversarial/{name}": one for name, one in {**terms, **logits}.items()}
    return total + judged - fixed(judged), metrics
