"""Memory, peak rates and bandwidths of TPU chips.

HBM is the memory that libtpu 0.0.42 grants a program, read from its out-of-memory errors. It is a little less than in
the data sheets. Peak rates and bandwidths come from "How to Scale Your Model" (jax-ml/scaling-book), chapter "All About
TPUs", which agrees with the system architecture pages of Google Cloud TPU.
"""

import dataclasses

from jax.sharding import Mesh


@dataclasses.dataclass(frozen=True)
class Chip:
    """A kind of chip.

    Attributes:
      name: short name, such as "v5e".
      hbm_bytes: memory available to a program.
      flops: peak bf16 operations per second.
      hbm_bandwidth: bytes per second.
      ring: a dim of a slice is a ring, with a link from its end to its start, if this divides its number of chips.
      ici_bandwidth: bytes per second over all links to neighbouring chips together, in one direction. An all-gather
        over a full torus reaches this rate.
    """

    name: str
    hbm_bytes: float
    flops: float
    hbm_bandwidth: float
    ici_bandwidth: float
    ring: int


# Keyed by the `device_kind` that JAX reports.
CHIPS = {
    "TPU v5 lite": Chip("v5e", 15.75 * 2**30, 1.97e14, 8.1e11, 4 * 5e10, ring=16),
    "TPU v5": Chip("v5p", 95.74 * 2**30, 4.59e14, 2.8e12, 6 * 1e11, ring=4),
    "TPU v6 lite": Chip("v6e", 31.25 * 2**30, 9.2e14, 1.6e12, 4 * 1e11, ring=16),
}


def chip_of(mesh: Mesh) -> Chip:
    """Returns the kind of chip that a mesh consists of.

    Raises:
      ValueError: for a kind without an entry in `CHIPS`.
    """
    kind = mesh.devices.flat[0].device_kind
    if kind not in CHIPS:
        raise ValueError(f"no limits known for {kind!r}, only for {sorted(CHIPS)}; add it to qi2_jax/runtime/chips.py")
    return CHIPS[kind]
