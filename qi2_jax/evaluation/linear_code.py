"""The best linear autoencoder of a given size: principal components of patches.

A patch of f x f pixels becomes its first C principal components, as many numbers as an autoencoder with factor f and C
latent channels has. It shows what an autoencoder of this size reaches without any non-linearity or context.

Dims: `H` `W` pixels, `P` patches, `D` values of a patch (3 f^2), `C` components.
"""

import dataclasses
from collections.abc import Iterable

import numpy as np
import scipy.linalg
from jaxtyping import Float, UInt8

MAX_VALUES = 3 * 32 * 32  # of a patch; its covariance and decomposition grow with the square and the cube


@dataclasses.dataclass(frozen=True)
class LinearCode:
    """Principal components of patches.

    Attributes:
      factor: side of a patch in pixels.
      mean_D: mean patch.
      basis_DC: components as orthonormal columns, largest variance first.
      num_patches: number of patches that the code was fitted on.
    """

    factor: int
    mean_D: Float[np.ndarray, " D"]
    basis_DC: Float[np.ndarray, "D C"]
    num_patches: int

    @property
    def channels(self) -> int:
        return self.basis_DC.shape[1]

    @property
    def name(self) -> str:
        return "linear code"

    def reconstruct(self, images_BHWc: UInt8[np.ndarray, "B H W 3"]) -> UInt8[np.ndarray, "B H W 3"]:
        """Encodes and decodes images whose sides are multiples of the factor; rounded to 8 bits."""
        rebuilt = [self._reconstruct(image) for image in images_BHWc]
        return np.stack(rebuilt)

    def _reconstruct(self, image: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "H W 3"]:
        code_PC = (_patches(image, self.factor) - self.mean_D) @ self.basis_DC
        patches = np.clip(np.round(code_PC @ self.basis_DC.T + self.mean_D), 0, 255).astype(np.uint8)
        h, w = image.shape[0] // self.factor, image.shape[1] // self.factor
        split = patches.reshape(h, w, self.factor, self.factor, 3)
        return split.transpose(0, 2, 1, 3, 4).reshape(image.shape)


def fit(images: Iterable[UInt8[np.ndarray, "_ _ 3"]], sizes: Iterable[tuple[int, int]]) -> list[LinearCode]:
    """Fits the codes of several sizes in one pass, with one image in memory at a time.

    Args:
      images: images whose sides are multiples of all factors.
      sizes: (factor, channels) of each code; a code has at most as many components as a patch has values.

    Raises:
      ValueError: if there is no image, or a patch has more than `MAX_VALUES` values.
    """
    wanted = list(dict.fromkeys(sizes))
    found: dict[int, Moments] = {}
    for factor, _ in wanted:
        values = 3 * factor**2
        if values > MAX_VALUES:
            raise ValueError(
                f"patches of {factor} x {factor} pixels have {values} values; at most {MAX_VALUES} are fitted"
            )
        found[factor] = Moments(values)
    for image in images:
        for factor, patches in found.items():
            patches.add(_patches(image, factor))
    if not all(patches.count for patches in found.values()):
        raise ValueError("the linear code needs at least one image to be fitted on")
    return [
        LinearCode(factor, found[factor].mean, found[factor].principal_components(channels)[1], found[factor].count)
        for factor, channels in wanted
    ]


class Moments:
    """Number, sum and products of rows of D values, in fp64.

    Attributes:
      count: number of rows.
    """

    def __init__(self, size: int):
        self.count = 0
        self._sum_D, self._products_DD = np.zeros(size), np.zeros((size, size))

    def add(self, rows_PD: Float[np.ndarray, "P D"]) -> None:
        self.count += len(rows_PD)
        self._sum_D += rows_PD.sum(axis=0)
        self._products_DD += rows_PD.T @ rows_PD

    @property
    def mean(self) -> Float[np.ndarray, " D"]:
        return self._sum_D / self.count

    @property
    def covariance(self) -> Float[np.ndarray, "D D"]:
        return self._products_DD / self.count - np.outer(self.mean, self.mean)

    def principal_components(self, count: int) -> tuple[Float[np.ndarray, " C"], Float[np.ndarray, "D C"]]:
        """Variances and orthonormal columns of the first components, at most D, largest variance first."""
        D = len(self._sum_D)
        variance_C, basis_DC = scipy.linalg.eigh(self.covariance, subset_by_index=(max(0, D - count), D - 1))
        return variance_C[::-1], basis_DC[:, ::-1]


def moments(parts: Iterable[Float[np.ndarray, "_ _"]]) -> Moments:
    """Moments of all rows of several parts.

    Raises:
      ValueError: without any part.
    """
    found: Moments | None = None
    for rows_PD in parts:
        found = found or Moments(rows_PD.shape[1])
        found.add(rows_PD)
    if found is None:
        raise ValueError("there are no rows")
    return found


def _patches(image: UInt8[np.ndarray, "H W 3"], factor: int) -> Float[np.ndarray, "P D"]:
    """The patches of an image, row by row, in fp64."""
    h, w = image.shape[0] // factor, image.shape[1] // factor
    split = image[: h * factor, : w * factor].reshape(h, factor, w, factor, 3)
    return split.transpose(0, 2, 1, 3, 4).reshape(h * w, -1).astype(np.float64)
