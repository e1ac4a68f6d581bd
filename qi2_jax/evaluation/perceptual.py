"""Metrics on the features of a frozen VGG16: LPIPS per image, and the Fréchet distance between two sets of images.

The Fréchet distance compares the mean and covariance of the features as FID does. FID itself is defined on the
features of another network (Inception, 2015), so the distance here has another name and other values.

Dims: `B` images, `H` `W` pixels, `F` features.
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jaxtyping import Array, Float, UInt8

from qi2_jax.interop import frozen
from qi2_jax.models.lpips import LPIPS
from qi2_jax.pixels import normalize

FRECHET_NAME = "rFID(vgg16)"


class Perceptual:
    """LPIPS and the pooled features of its VGG16 (relu5_3, averaged over positions).

    Args:
      folder: weights that `qi2 import` wrote.

    Raises:
      ValueError: as `frozen.read_lpips`.
    """

    def __init__(self, folder: pathlib.Path):
        self._model = frozen.read_lpips(folder)
        self.digest = frozen.digest(folder)

    def __call__(
        self, images_BHWc: UInt8[np.ndarray, "B H W 3"], others_BHWc: UInt8[np.ndarray, "B H W 3"]
    ) -> tuple[Float[np.ndarray, " B"], Float[np.ndarray, "B F"], Float[np.ndarray, "B F"]]:
        """The distance of each image to its counterpart, and the features of both."""
        with jax.default_matmul_precision("highest"):
            found = _compare(self._model, normalize(images_BHWc), normalize(others_BHWc))
        distances, features, others = map(np.asarray, found)
        return distances, features, others


@jax.jit
def _compare(
    model: LPIPS, images_BHWc: Float[Array, "B H W 3"], others_BHWc: Float[Array, "B H W 3"]
) -> tuple[Float[Array, " B"], Float[Array, "B F"], Float[Array, "B F"]]:
    a, b = model.features(images_BHWc), model.features(others_BHWc)
    return model.distance(a, b), jnp.mean(a[-1], axis=(1, 2)), jnp.mean(b[-1], axis=(1, 2))


def frechet_distance(a_BF: Float[np.ndarray, "A F"], b_BF: Float[np.ndarray, "B F"]) -> float:
    """Squared Fréchet distance between normal distributions with the mean and covariance of two sets of features.

    Covariances are divided by the number of images. The distance of two sets is biased upwards if they have few images.
    """
    a, b = a_BF.astype(np.float64), b_BF.astype(np.float64)
    difference = a.mean(axis=0) - b.mean(axis=0)
    # The singular values of the product of the centred sets are the square roots that the covariance term needs.
    a, b = (x - x.mean(axis=0) for x in (a, b))
    shared = scipy.linalg.svdvals(_root(a) @ _root(b).T).sum()
    total = difference @ difference + np.sum(a * a) / len(a) + np.sum(b * b) / len(b) - 2 * shared
    return float(max(total, 0.0))


def _root(centred_BF: Float[np.ndarray, "B F"]) -> Float[np.ndarray, "R F"]:
    """A matrix R with R^T R equal to the covariance, and at most F rows."""
    scaled = centred_BF / len(centred_BF) ** 0.5
    return scaled if len(scaled) <= scaled.shape[1] else np.linalg.qr(scaled).R
