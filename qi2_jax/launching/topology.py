"""Accelerators on which a job can run: slices of TPUs with their machine types and labels, and nodes with GPUs."""

import dataclasses
import math
import re

MAX_SLICES = 1024


@dataclasses.dataclass(frozen=True)
class TpuKind:
    """A generation of TPUs with four chips per host.

    Sources, read in November 2026: machine types and accelerators from "Plan TPUs in GKE"
    (https://cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus) and, with the shapes, from `xpk` 1.16
    (https://github.com/AI-Hypercomputer/xpk, `system_characteristics.py`); runtime versions from
    https://cloud.google.com/tpu/docs/runtimes; accelerator types from https://cloud.google.com/tpu/docs/v6e, v5p and
    v5e.

    Attributes:
      name: short name, as in `qi2_jax.runtime.chips`.
      machine_type: machine type of a node with four chips.
      accelerator: value of the node label `cloud.google.com/gke-tpu-accelerator`.
      accelerator_type: prefix of the type in the Cloud TPU API.
      cores_per_chip: TensorCores per chip that the number in an accelerator type counts.
      runtime: runtime version of a TPU VM.
      shapes: shapes of a slice; empty: see `_is_cuboid_of_cubes`.
    """

    name: str
    machine_type: str
    accelerator: str
    accelerator_type: str
    cores_per_chip: int
    runtime: str
    shapes: tuple[tuple[int, ...], ...] = ()

    @property
    def example(self) -> str:
        """A valid topology, for error messages."""
        return f"{self.name}:" + "x".join(map(str, self.shapes[-1] if self.shapes else (4, 4, 8)))


_FLAT = ((2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
CHIPS_PER_HOST = 4
KINDS = {
    kind.name: kind
    for kind in (
        TpuKind("v5e", "ct5lp-hightpu-4t", "tpu-v5-lite-podslice", "v5litepod", 1, "v2-alpha-tpuv5-lite", _FLAT),
        TpuKind("v5p", "ct5p-hightpu-4t", "tpu-v5p-slice", "v5p", 2, "v2-alpha-tpuv5"),
        TpuKind("v6e", "ct6e-standard-4t", "tpu-v6e-slice", "v6e", 1, "v2-alpha-tpuv6e", _FLAT),
    )
}
_SMALL_CUBOIDS = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))
_MAX_CUBES = 140  # cubes of 4 x 4 x 4 chips in the largest slice of v5p, as in `xpk`


@dataclasses.dataclass(frozen=True)
class Slice:
    """A slice of TPU chips with direct links between them.

    Attributes:
      kind: generation.
      shape: chips along each axis of the torus.
    """

    kind: TpuKind
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.kind.name}:{self.label}"

    @property
    def label(self) -> str:
        """Value of the node label `cloud.google.com/gke-tpu-topology`, such as "16x16"."""
        return "x".join(map(str, self.shape))

    @property
    def chips(self) -> int:
        return math.prod(self.shape)

    @property
    def hosts(self) -> int:
        """Nodes of the machine type in `kind`."""
        return self.chips // CHIPS_PER_HOST

    @property
    def accelerator_type(self) -> str:
        """Type in the Cloud TPU API and in `xpk`, such as "v6e-256" or, counted in cores, "v5p-512"."""
        return f"{self.kind.accelerator_type}-{self.chips * self.kind.cores_per_chip}"


@dataclasses.dataclass(frozen=True)
class GpuNode:
    """A node with GPUs.

    Attributes:
      kind: type of the GPUs, as Slurm names it.
      gpus: number of GPUs.
    """

    kind: str
    gpus: int

    def __str__(self) -> str:
        return f"{self.kind}:{self.gpus}"

    @property
    def chips(self) -> int:
        return self.gpus


def parse_slice(text: str) -> Slice:
    """Parses a topology such as "v6e:16x16" or "v5p:4x4x8".

    Raises:
      ValueError: for an unknown generation, or a shape that it does not have.
    """
    name, _, dims = text.partition(":")
    kind = KINDS.get(name)
    if kind is None or not re.fullmatch(r"[1-9]\d{0,3}(x[1-9]\d{0,3}){1,2}", dims, re.ASCII):
        examples = ", ".join(kind.example for kind in KINDS.values())
        raise ValueError(f"--topology is {text!r}; write a TPU slice like one of {examples}")
    shape = tuple(map(int, dims.split("x")))
    if shape not in kind.shapes and not (kind.shapes == () and _is_cuboid_of_cubes(shape)):
        known = ", ".join("x".join(map(str, shape)) for shape in kind.shapes or _SMALL_CUBOIDS)
        more = "" if kind.shapes else ", and AxBxC with multiples of 4 in rising order, such as 4x4x8"
        raise ValueError(f"--topology is {text!r}; {name} has slices of {known}{more}")
    return Slice(kind, shape)


def _is_cuboid_of_cubes(shape: tuple[int, ...]) -> bool:
    """Whether v5p has a slice of this shape: some small ones, and cuboids of cubes of 4 x 4 x 4 chips."""
    if shape in _SMALL_CUBOIDS:
        return True
    of_cubes = len(shape) == 3 and list(shape) == sorted(shape) and all(size % 4 == 0 for size in shape)
    return of_cubes and math.prod(shape) <= 64 * _MAX_CUBES


def parse_node(text: str) -> GpuNode:
    """Parses the GPUs of a node, such as "h100:8".

    Raises:
      ValueError: for anything else.
    """
    match = re.fullmatch(r"([a-z][a-z0-9_.-]{0,31}):([1-9]\d?)", text, re.ASCII)
    if match is None or match[1] in KINDS:
        raise ValueError(f"--topology is {text!r}; with --on slurm, write the GPUs of one node, such as h100:8")
    return GpuNode(match[1], int(match[2]))
