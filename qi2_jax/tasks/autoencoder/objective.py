"""The training objective of the autoencoder: its loss and its validation.

Dims: `B` batch, `H` `W` pixels, `c` image channels, `h` `w` rows and columns of latents, `C` latent channels.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Key

from qi2_jax import sharding
from qi2_jax.models.layers import AnyArray, Axes
from qi2_jax.models.vae import VAE, Posterior
from qi2_jax.tasks.autoencoder import adversary
from qi2_jax.tasks.autoencoder.alignment import Part, balanced, feature_map, terms
from qi2_jax.tasks.autoencoder.config import (
    ERRORS,
    AdversarialConfig,
    AlignmentConfig,
    AutoencoderConfig,
    ExecutionConfig,
    PerceptualConfig,
)
from qi2_jax.tasks.autoencoder.networks import Networks
from qi2_jax.tasks.autoencoder.trained_vae import TrainedVAE
from qi2_jax.training.step import Scalars

PIXELS: Axes = ("batch", "rows", None, None)


def reconstruct(vae: VAE, pixels_BHWc: Float[AnyArray, "B H W c"]) -> Float[Array, "B H W c"]:
    """Decodes the mode of the posterior; values may lie outside [-1, 1]."""
    return vae.decode(vae.encode(pixels_BHWc).mean, clamp=False)


class Crop(NamedTuple):
    """A batch.

    Attributes:
      pixels_BHWc: images in [-1, 1].
      schedule_B3: values of `alignment.Schedule`, the same for every image; None without alignment.
    """

    pixels_BHWc: Float[AnyArray, "B H W c"]
    schedule_B3: Float[AnyArray, "B 3"] | None = None


@dataclasses.dataclass(frozen=True)
class Objective:
    """The loss of Qwen-Image-VAE-2.0 (arXiv 2605.13565): error of the pixels, LPIPS, and alignment of the latents.

    The report has neither a KL nor an adversarial term; both are options here.

    Attributes:
      error: error of reconstructed pixels in [-1, 1], a key of `ERRORS`. The report uses "absolute", which keeps edges
        sharp. "squared" learns faster from scratch, where absolute errors miss small dark letters on a bright ground.
      perceptual: see `AutoencoderConfig`.
      alignment: see `AutoencoderConfig`.
      kl: see `AutoencoderConfig`.
      execution: see `AutoencoderConfig`.
      adversarial: see `AutoencoderConfig`.
      constrain: function that shards images over the mesh by the logical names of their dims.
    """

    error: str
    perceptual: PerceptualConfig = dataclasses.field(default_factory=PerceptualConfig)
    alignment: AlignmentConfig = dataclasses.field(default_factory=AlignmentConfig)
    kl: float = 0.0
    execution: ExecutionConfig = dataclasses.field(default_factory=ExecutionConfig)
    adversarial: AdversarialConfig = dataclasses.field(default_factory=AdversarialConfig)
    constrain: Callable[[Array, Axes], Array] = lambda x, axes: x

    @classmethod
    def of(cls, config: AutoencoderConfig, mesh: Mesh) -> Self:
        """The objective of a run on a mesh."""
        terms = config.perceptual, config.alignment, config.kl
        return cls(config.loss, *terms, config.execution, config.adversarial, sharding.Constrain(mesh))

    def loss(
        self, vae: VAE, networks: Networks, layout: None, batch: Crop, keys_B: Key[Array, "B"]
    ) -> tuple[Float[Array, ""], Scalars]:
        """The loss of a batch and the value of each term; a `step.Loss`."""

        def encode(vae: VAE) -> Posterior:
            return self._encode(vae, batch.pixels_BHWc)

        def reconstruction(posterior: Posterior, vae: VAE) -> tuple[Float[Array, ""], Scalars]:
            rebuilt = self._decode(vae, self._latents(posterior, keys_B))
            return self._error(rebuilt, networks, batch.pixels_BHWc, keys_B)

        if self.alignment.weight:
            assert batch.schedule_B3 is not None
            align, weight = self._alignment(networks, batch), jnp.asarray(batch.schedule_B3)[0, 2]
            posterior, value, metrics = balanced(vae, encode, reconstruction, align, weight)
        else:
            posterior = encode(vae)
            value, metrics = reconstruction(posterior, vae)
        if self.kl:
            divergence = kl_divergence(posterior, batch.pixels_BHWc.size)
            value, metrics = value + self.kl * divergence, {**metrics, "kl": divergence}
        return value, metrics

    def adversarial_loss(
        self, vae: TrainedVAE, networks: Networks, layout: None, batch: Crop, keys_B: Key[Array, "B"]
    ) -> tuple[Float[Array, ""], Scalars]:
        """The loss of a batch of the adversarial phase; a `step.Loss`.

        Alignment and KL divergence do not count, since they are terms of the encoder, which is not trained.
        """
        posterior = self._encode(vae, batch.pixels_BHWc)
        latents_BhwC = jax.lax.stop_gradient(self._latents(posterior, keys_B))

        def decode(vae: VAE) -> Float[Array, "B H W c"]:
            return self._decode(vae, latents_BhwC)

        def reconstruction(rebuilt_BHWc: Float[Array, "B H W c"]) -> tuple[Float[Array, ""], Scalars]:
            return self._error(rebuilt_BHWc, networks, batch.pixels_BHWc, keys_B)

        def seen(images_BHWc: Float[AnyArray, "B H W c"]) -> Float[Array, "B H W 3"]:
            return over_matte(images_BHWc, _matte(keys_B)).astype(self.execution.dtype)

        return adversary.loss(vae, decode, reconstruction, seen, batch.pixels_BHWc, self.adversarial.weight)

    def evaluate(
        self, vae: VAE, networks: Networks, batch: Crop, keys_B: Key[Array, "B"]
    ) -> tuple[Float[Array, ""], Scalars]:
        """The loss of reconstructions of the posterior's mode: error of the pixels and LPIPS.

        The alignment does not count, because its weight depends on gradients; its terms are among the metrics.
        """
        latents = self._encode(vae, batch.pixels_BHWc).mean
        value, metrics = self._error(self._decode(vae, latents), networks, batch.pixels_BHWc, keys_B)
        if self.alignment.weight:
            metrics |= self._alignment(networks, batch)(Posterior(latents, latents), vae)[1]
        return value, metrics

    def _encode(self, vae: VAE, pixels_BHWc: Float[AnyArray, "B H W c"]) -> Posterior:
        images = self.constrain(jnp.asarray(pixels_BHWc, self.execution.dtype), PIXELS)
        posterior = vae.encode(images, remat_levels=self.execution.levels(*images.shape[1:3]))
        return Posterior(*(part.astype(jnp.float32) for part in posterior))

    def _latents(self, posterior: Posterior, keys_B: Key[Array, "B"]) -> Float[Array, "B h w C"]:
        """The latents that training decodes."""
        return _sampled(posterior, _fold_in(keys_B, 1)) if self.kl else posterior.mean

    def _decode(self, vae: VAE, latents_BhwC: Float[Array, "B h w C"]) -> Float[Array, "B H W c"]:
        height, width = (side * vae.config.factor for side in latents_BhwC.shape[1:3])
        latents, levels = latents_BhwC.astype(self.execution.dtype), self.execution.levels(height, width)
        return self.constrain(vae.decode(latents, clamp=False, remat_levels=levels).astype(jnp.float32), PIXELS)

    def _error(
        self,
        rebuilt_BHWc: Float[Array, "B H W c"],
        networks: Networks,
        pixels_BHWc: Float[AnyArray, "B H W c"],
        keys_B: Key[Array, "B"],
    ) -> tuple[Float[Array, ""], Scalars]:
        """Error of the pixels and LPIPS of reconstructions."""
        error = rebuilt_BHWc - pixels_BHWc
        value = jnp.mean(ERRORS[self.error](error))
        metrics: Scalars = {"psnr": _psnr(rebuilt_BHWc, pixels_BHWc)}
        if networks.lpips is not None:
            matte_B = _matte(keys_B)
            pair = rebuilt_BHWc, self.constrain(jnp.asarray(pixels_BHWc), PIXELS)
            images = (over_matte(x, matte_B).astype(self.execution.dtype) for x in pair)
            remat = self.execution.levels(*pixels_BHWc.shape[1:3]) > 0
            distance = jnp.mean(networks.lpips(*images, remat=remat))
            value, metrics = value + self.perceptual.weight * distance, {**metrics, "lpips": distance}
        return value, metrics

    def _alignment(self, networks: Networks, batch: Crop) -> Part:
        """The alignment of latents with the features of `batch`."""
        network, schedule_B3 = networks.features, batch.schedule_B3
        assert network is not None and schedule_B3 is not None
        images = over_matte(batch.pixels_BHWc, jnp.ones(1))

        def align(posterior: Posterior, vae: TrainedVAE) -> tuple[Float[Array, ""], Scalars]:
            _, h, w, _ = posterior.mean.shape
            features = jax.lax.stop_gradient(
                feature_map(network, self.alignment.layer, images, (h, w), self.execution.dtype)
            )
            assert vae.projection is not None
            return terms(vae.projection(posterior.mean), features, schedule_B3[:, :2])

        return align


def over_matte(images_BHWc: Float[AnyArray, "B H W c"], matte_B: Float[AnyArray, " _"]) -> Float[Array, "B H W 3"]:
    """RGB in [-1, 1], with transparent images laid over a gray level for each image, or over one for all.

    Networks for RGB see a reconstruction as a viewer does: the colour of transparent pixels, which is arbitrary, does
    not count, and an error of the alpha channel does. LPIPS compares over a random gray level, so that no
    transparent part can match by having the colour of the matte. Features are those over white, as for the condition
    encoder, because the target of the alignment must not depend on chance.
    """
    images_BHWc = jnp.asarray(images_BHWc)
    if images_BHWc.shape[-1] == 3:
        return images_BHWc
    alpha = (images_BHWc[..., 3:] + 1) / 2
    return alpha * images_BHWc[..., :3] + (1 - alpha) * matte_B[:, None, None, None]


def _matte(keys_B: Key[Array, "B"]) -> Float[Array, " B"]:
    """A random gray level for each image."""
    return jax.vmap(lambda key: jax.random.uniform(key, minval=-1, maxval=1))(keys_B)


def kl_divergence(posterior: Posterior, num_values: int) -> Float[Array, ""]:
    """KL divergence between the posterior and the standard normal, summed over latents and divided by `num_values`.

    With the number of values of all pixels, it has the scale of the mean error, and the weight has the scale of models
    that sum both, such as 1e-6.
    """
    mean, logvar = posterior
    return 0.5 * jnp.sum(mean**2 + jnp.exp(logvar) - 1 - logvar) / num_values


def _sampled(posterior: Posterior, keys_B: Key[Array, "B"]) -> Float[Array, "B h w C"]:
    mean, logvar = posterior
    noise = jax.vmap(lambda key: jax.random.normal(key, mean.shape[1:], mean.dtype))(keys_B)
    return mean + jnp.exp(logvar / 2) * noise


def _fold_in(keys_B: Key[Array, "B"], number: int) -> Key[Array, "B"]:
    return jax.vmap(lambda key: jax.random.fold_in(key, number))(keys_B)


def _psnr(rebuilt_BHWc: Float[AnyArray, "B H W c"], pixels_BHWc: Float[AnyArray, "B H W c"]) -> Float[Array, ""]:
    """PSNR over all pixels, of what a viewer sees: RGB over white, within [-1, 1]."""
    ours, theirs = (over_matte(jnp.clip(x, -1, 1), jnp.ones(1)) for x in (rebuilt_BHWc, pixels_BHWc))
    return 10 * jnp.log10(4.0 / jnp.mean(jnp.square(ours - theirs)))  # the range [-1, 1] is 2 wide
