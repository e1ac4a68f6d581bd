"""Mean and covariance of many rows of numbers, and their principal components.

Dims: `P` rows, `D` values of a row, `C` components.
"""

from collections.abc import Iterable

import numpy as np
import scipy.linalg
from jaxtyping import Float


class RowMoments:
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


def of(parts: Iterable[Float[np.ndarray, "_ _"]]) -> RowMoments:
    """RowMoments of all rows of several parts.

    Raises:
      ValueError: without any part.
    """
    found: RowMoments | None = None
    for rows_PD in parts:
        found = found or RowMoments(rows_PD.shape[1])
        found.add(rows_PD)
    if found is None:
        raise ValueError("there are no rows")
    return found
