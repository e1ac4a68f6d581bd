"""Where tensors live: mesh axes, the table from logical dims to axes, and activation constraints.

Models name dims, never mesh axes; this table is the only place that connects the two.
"""

import collections
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from qi2_jax import attention
from qi2_jax.models.tree import leaf_name

AXES = ("data", "fsdp", "tensor")

# Logical dim -> mesh axes it is split over. Parameters are split over `fsdp` along the model width and over `tensor`
# along heads and hidden units; activations are split over `data` and `fsdp` along the batch, and over `tensor` along
# heads, hidden units and, between the layers, the model width: kept whole there, the blocks' inputs that wait for the
# backward pass would take 35 instead of 21 GiB of a v6e chip at 2048p with three condition images and tensor=4.
RULES: dict[str | None, tuple[str, ...]] = {
    None: (),
    "layers": (),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "conv": (),
    "batch": ("data", "fsdp"),
    "sequence": (),
    "act_embed": ("tensor",),
    "act_heads": ("tensor",),
    "act_mlp": ("tensor",),
}


LARGE = 1 << 22  # elements of a weight, stacked layers together: 64 MiB with moments and average in fp32


@dataclasses.dataclass(frozen=True)
class MeshShape:
    """Number of devices along each mesh axis: `data` across slices, `fsdp` within, `tensor` for wide layers."""

    data: int = 1
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self):
        if min(self.data, self.fsdp, self.tensor) < 1:
            raise ValueError(f"mesh data={self.data} x fsdp={self.fsdp} x tensor={self.tensor}: axes have at least 1")

    @property
    def size(self) -> int:
        return self.data * self.fsdp * self.tensor


def make_mesh(shape: MeshShape, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of exactly `shape.size` devices, with axes for the automatic partitioner.

    TPU chips of several slices are laid out along `data`: slice i has the i-th run of `data` / slices indices, and
    `fsdp` and `tensor` lie within it. Weights are split over these two, so they are gathered, and activations
    exchanged, over a slice's own links. What crosses slices, over the slower network of the data center, are the
    reductions over `data`: the sums of the gradients, once for each part in which a batch is computed, of which every
    chip sends those of the weights that it holds; and those of scalars, such as the loss.

    Raises:
      ValueError: if the number of devices is another one, or they cannot be split over their slices so.
    """
    devices = jax.devices() if devices is None else devices
    named = f"the mesh data={shape.data} x fsdp={shape.fsdp} x tensor={shape.tensor}"
    if len(devices) != shape.size:
        raise ValueError(
            f"{named} needs {shape.size} devices, but {len(devices)} are present; change config.mesh, or on a CPU set "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={shape.size}"
        )
    sizes = chips_of_slices(devices)
    slices = max(len(sizes), 1)
    if len(set(sizes.values())) > 1:
        raise ValueError(f"{named} needs slices of equal size, but slice -> chips is {sizes}; leave some of them out")
    if shape.data % slices:
        raise ValueError(
            f"{named} does not split over {slices} slices of {shape.size // slices} chips: fsdp and tensor stay within "
            f"a slice; make data a multiple of {slices} and fsdp x tensor a divisor of {shape.size // slices}, such as "
            f"data={slices} x fsdp={shape.size // slices} x tensor=1"
        )
    within = (shape.data // slices, shape.fsdp, shape.tensor)
    # An axis may take part of a side of the torus: 4 of 16 chips, say.
    if slices > 1:
        arranged = mesh_utils.create_hybrid_device_mesh(within, (slices, 1, 1), devices, allow_split_physical_axes=True)
    else:
        arranged = mesh_utils.create_device_mesh(within, devices, allow_split_physical_axes=True)
    return Mesh(arranged, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def chips_of_slices(devices: Sequence[Any]) -> dict[int, int]:
    """How many of the devices each slice has: TPU chips that are connected by links of their own.

    Chips of a job of one slice may not name it; other platforms have no such links, whatever they call a slice.
    """
    found = collections.Counter(getattr(device, "slice_index", 0) for device in devices if device.platform == "tpu")
    return dict(sorted(found.items()))


def spec(mesh: Mesh, shape: Sequence[int], names: Sequence[str | None]) -> PartitionSpec:
    """Partition of an array whose dims have logical `names`; a dim that its axes do not divide stays whole.

    Tiny models on wide meshes would otherwise fail on their smallest dims; for the published sizes every rule applies,
    and `left_whole` names the large weights for which one does not.

    Raises:
      KeyError: for a logical name that the table lacks.
    """
    parts: list[tuple[str, ...] | None] = []
    for size, name in zip(shape, names, strict=True):
        axes = RULES[name]
        parts.append(axes if axes and size % math.prod(mesh.shape[axis] for axis in axes) == 0 else None)
    while parts and parts[-1] is None:
        parts.pop()  # the form in which jit returns shardings: equal ones must compare as equal
    return PartitionSpec(*parts)


def shardings(tree: Any, mesh: Mesh) -> Any:
    """Shardings of a (possibly abstract) tree: parameters by their `axes`, everything else replicated.

    The result is a tree prefix of `tree`, as `jax.jit` and `jax.device_put` accept it.
    """

    def of_leaf(leaf):
        return NamedSharding(mesh, spec(mesh, *_dims(leaf)) if _is_parameter(leaf) else PartitionSpec())

    return jax.tree.map(of_leaf, tree, is_leaf=_is_parameter)


def _is_parameter(leaf: Any) -> bool:
    return isinstance(leaf, nnx.Variable)


def _dims(parameter: Any) -> tuple[tuple[int, ...], tuple[str | None, ...]]:
    """Sizes of the dims of a parameter and their logical names."""
    shape, names = parameter.get_value().shape, tuple(parameter.get_metadata()["axes"])
    return shape, ("layers",) * (len(shape) - len(names)) + names


def left_whole(model: Any, mesh: Mesh) -> list[str]:
    """A line for each mesh axis that does not divide all large weights which the table splits over it, naming these.

    Args:
      model: parameters, which may be abstract. Those of less than `LARGE` elements may be held by every device.

    Raises:
      ValueError: if an axis divides none of them: the devices along it would all hold the same.
    """
    divided: set[str] = set()
    whole: dict[str, list[str]] = collections.defaultdict(list)
    for path, leaf in jax.tree_util.tree_flatten_with_path(model, is_leaf=_is_parameter)[0]:
        shape, names = _dims(leaf)
        if math.prod(shape) < LARGE:
            continue
        for size, name in zip(shape, names, strict=True):
            for axis in RULES[name]:
                if size % mesh.shape[axis]:
                    whole[axis].append(f"{leaf_name(path)} {list(shape)} by its dim of {size}")
                elif mesh.shape[axis] > 1:
                    divided.add(axis)
    for axis, weights in whole.items():
        if axis not in divided:
            raise ValueError(
                f"mesh.{axis}={mesh.shape[axis]} divides no large weight of the model, so its devices would all hold "
                f"the same: {', '.join(weights)}. Choose a divisor of these dims; devices that are left over go to data"
            )
    return [
        f"mesh.{axis}={mesh.shape[axis]} does not split {', '.join(weights)}: its devices hold the same of these"
        for axis, weights in whole.items()
    ]


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of a host batch: its leading dim over every data axis."""
    return NamedSharding(mesh, PartitionSpec(RULES["batch"]))


def batch_parts(mesh: Mesh) -> int:
    """Over how many parts of the mesh a batch is split: its devices along `data` and `fsdp`."""
    return math.prod(mesh.shape[axis] for axis in RULES["batch"])


def own_rows(mesh: Mesh, batch_size: int) -> tuple[int, ...]:
    """Which rows of a global batch this process's devices hold, ascending; several processes may hold the same.

    Raises:
      ValueError: if the batch cannot be split over the mesh.
    """
    parts = batch_parts(mesh)
    if batch_size < 1 or batch_size % parts:
        raise ValueError(f"a batch of {batch_size} does not split over data x fsdp = {parts} devices")
    places = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    return tuple(sorted({row for index in places if index for row in range(*index[0].indices(batch_size))}))


def put_batch(mesh: Mesh, batch: Any, batch_size: int) -> Any:
    """Makes global arrays of `batch_size` rows from arrays that hold the `own_rows` of this process.

    Raises:
      ValueError: for arrays of another number of rows.
    """
    sharding, own = batch_sharding(mesh), own_rows(mesh, batch_size)

    def put(rows):
        rows = np.asarray(rows)
        if len(rows) != len(own):
            raise ValueError(f"a batch has {len(rows)} rows; this process holds {len(own)} of {batch_size}")

        def held(index):
            start, stop, _ = index[0].indices(batch_size)
            first = own.index(start)
            return rows[first : first + stop - start]

        return jax.make_array_from_callback((batch_size, *rows.shape[1:]), sharding, held)

    return jax.tree.map(put, batch)


@dataclasses.dataclass(frozen=True)
class Constrain:
    """Places activations on a mesh by logical names; hashable, so an `Execution` holding it can be static."""

    mesh: Mesh

    def __call__(self, x: jax.Array, names: tuple[str | None, ...]) -> jax.Array:
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec(self.mesh, x.shape, names)))


@dataclasses.dataclass(frozen=True)
class Attention:
    """An attention kernel that every device runs on its own samples and heads; hashable, for `Execution.kernel`.

    Attributes:
      mesh: the devices; "auto" chooses by their platform.
      kernel: what each device runs, see `attention.attention`.
    """

    mesh: Mesh
    kernel: str | attention.Kernel = "auto"

    def __call__(self, q_BSHK, k_BTGK, v_BTGK, visible_until, key_valid_BT):
        kernel = self.kernel
        if isinstance(kernel, str):
            kernel = attention.choose(kernel, self.mesh.devices.flat[0].platform)
        # By the keys' heads: where they are too few to be split, their queries must stay together too.
        split = spec(self.mesh, k_BTGK.shape, ("batch", None, "act_heads", None))
        local = jax.shard_map(
            lambda q, k, v, valid: kernel(q, k, v, visible_until, valid),
            mesh=self.mesh,
            in_specs=(split, split, split, PartitionSpec(*tuple(split)[:1])),
            out_specs=split,
            check_vma=False,  # Pallas kernels do not say how their outputs vary over the mesh
        )
        return local(q_BSHK, k_BTGK, v_BTGK, key_valid_BT)
