"""Limits of TPU chips.

HBM is what the compiler of libtpu 0.0.42 offers a program (from its out-of-memory errors), a little less than the data
sheets say. Peak rates and bandwidths: "How to Scale Your Model" (jax-ml/scaling-book), chapter "All About TPUs", which
agrees with the system architecture pages of Google Cloud TPU.
"""

import dataclasses

from jax.sharding import Mesh


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip.

    Attributes:
      hbm_bytes: memory that a program may use.
      flops: peak bf16 operations per second.
      hbm_bandwidth: bytes per second.
      ici_bandwidth: bytes per second that the chip sends over all its links to neighbours, each in one direction; what
        a gather over a full torus reaches.
    """

    name: str
    hbm_bytes: float
    flops: float
    hbm_bandwidth: float
    ici_bandwidth: float


# By the `device_kind` that JAX reports.
CHIPS = {
    "TPU v5 lite": Chip("v5e", 15.75 * 2**30, 1.97e14, 8.1e11, 4 * 5e10),
    "TPU v5": Chip("v5p", 95.74 * 2**30, 4.59e14, 2.8e12, 6 * 1e11),
    "TPU v6 lite": Chip("v6e", 31.25 * 2**30, 9.2e14, 1.6e12, 4 * 1e11),
}


def chip_of(mesh: Mesh) -> Chip:
    """The chip of a mesh.

    Raises:
      ValueError: for devices of another kind.
    """
    kind = mesh.devices.flat[0].device_kind
    if kind not in CHIPS:
        raise ValueError(f"limits of {kind!r} are unknown, only those of {sorted(CHIPS)}; add it to planning/chips.py")
    return CHIPS[kind]
