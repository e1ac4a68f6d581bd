"""The mesh, the table from logical dims to mesh axes, and sharding constraints of activations.

Models name dims and never mesh axes. The table `RULES` is the only place that connects the two.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, Literal, TypeVar

import jax
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float
from numpy.typing import ArrayLike

from qi2_jax import attention
from qi2_jax.models.tree import leaf_name

AXES = ("data", "fsdp", "tensor")
Module = TypeVar("Module")

# Logical dim -> mesh axes over which it is sharded. Parameters are sharded over `fsdp` along the model width and over
# `tensor` along heads and hidden units. Activations are sharded over `data` and `fsdp` along the batch, and over
# `tensor` along heads, hidden units and, between the layers, the model width.
RULES: dict[str | None, tuple[str, ...]] = {
    None: (),
    "layers": (),
    "embed": ("fsdp",),
    "shards": ("fsdp", "tensor"),  # `embed` of a weight on its way between storage and gathering
    "heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "conv": (),
    "batch": ("data", "fsdp"),
    "replicas": ("data",),  # of gradients that are not summed over them yet
    "sequence": (),
    "rows": ("tensor",),  # of pixels: the autoencoder has no weights to shard over `tensor`
    "act_embed": ("tensor",),
    "act_heads": ("tensor",),
    "act_mlp": ("tensor",),
}
# What the axis `tensor` divides in a program, and the rules that this changes. With "heads", chips exchange activations
# before and after each product. With "images", each chip computes whole images with gathered weights, and no activation
# travels; there must be as many images as chips. With "sequence", each chip computes a part of the tokens with gathered
# weights; attention divides heads, so queries, keys and values travel before it and its result after it (DeepSpeed
# Ulysses, Jacobs et al., 2023).
Divided = Literal["heads", "images", "sequence"]
DIVIDED: dict[Divided, dict[str | None, tuple[str, ...]]] = {
    "heads": {},
    "images": {"batch": ("data", "fsdp", "tensor"), "act_embed": (), "act_heads": (), "act_mlp": ()},
    "sequence": {"sequence": ("tensor",), "act_embed": (), "act_heads": (), "act_mlp": ()},
}

LARGE = 1 << 22  # elements of a weight, all layers of a stack together: 64 MiB with moments and EMA in fp32


@dataclasses.dataclass(frozen=True)
class MeshShape:
    """Number of devices along each mesh axis.

    Attributes:
      data: replicas of the model; the only axis that may cross slices.
      fsdp: shards of the parameters along the model width, and of the batch.
      tensor: shards of heads and hidden units at rest; what it divides in a program, see `DIVIDED`. For an autoencoder,
        shards of the rows of a crop.
    """

    data: int = 1
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        if min(self.data, self.fsdp, self.tensor) < 1:
            raise ValueError(
                f"mesh data={self.data} x fsdp={self.fsdp} x tensor={self.tensor}: each axis needs at least 1"
            )

    @property
    def size(self) -> int:
        return self.data * self.fsdp * self.tensor


def make_mesh(shape: MeshShape, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of exactly `shape.size` devices, with axes for the automatic partitioner.

    Slices of TPU chips are laid out along `data`: each slice has `data` / slices consecutive indices, and `fsdp` and
    `tensor` lie within a slice. Weights are sharded over these two axes, so weights and activations travel over the
    links of a slice. Only sums over `data` cross slices, of gradients and of scalars such as the loss. Those of the
    transformer's gradients cross once per update, see `step.make_programs`.

    Args:
      shape: devices along each axis.
      devices: devices to use; None: all of them.

    Raises:
      ValueError: if there are more or fewer devices, or the shape does not fit their slices.
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
        raise ValueError(
            f"{named} needs slices of equal size, but slice -> chips is {sizes}; leave the surplus chips out"
        )
    if shape.data % slices:
        raise ValueError(
            f"{named} does not split over {slices} slices of {shape.size // slices} chips: fsdp and tensor must stay "
            f"within a slice. Make data a multiple of {slices} and fsdp x tensor a divisor of {shape.size // slices}, "
            f"such as data={slices} x fsdp={shape.size // slices} x tensor=1"
        )
    within = (shape.data // slices, shape.fsdp, shape.tensor)
    # An axis may take a part of a side of the torus, for example 4 of 16 chips.
    if slices > 1:
        arranged = mesh_utils.create_hybrid_device_mesh(within, (slices, 1, 1), devices, allow_split_physical_axes=True)
    else:
        arranged = mesh_utils.create_device_mesh(within, devices, allow_split_physical_axes=True)
    return Mesh(arranged, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def chips_of_slices(devices: Sequence[Any]) -> dict[int, int]:
    """{slice: number of chips}: a slice is a group of TPU chips with direct links between them.

    In a job of one slice, chips may have no `slice_index`. Other platforms have no such links, even if their devices
    have a `slice_index`, so the result is empty for them.
    """
    found = collections.Counter(getattr(device, "slice_index", 0) for device in devices if device.platform == "tpu")
    return dict(sorted(found.items()))


def spec(
    mesh: Mesh,
    shape: Sequence[int],
    names: Sequence[str | None],
    without: Sequence[str] = (),
    divided: Divided = "heads",
) -> PartitionSpec:
    """Partition of an array; a dim that its axes do not divide is replicated.

    Without this rule, tiny models on wide meshes would fail on their smallest dims. For the published sizes every table
    entry applies, and `unsharded_weights` names the large weights to which one does not apply.

    Args:
      mesh: device mesh.
      shape: sizes of the array's dims.
      names: logical names of the dims.
      without: mesh axes that shard no dim.
      divided: what `tensor` divides, see `DIVIDED`.

    Raises:
      KeyError: for a logical name that is not in the table.
    """
    parts: list[tuple[str, ...] | None] = []
    for size, name in zip(shape, names, strict=True):
        axes = DIVIDED[divided].get(name, RULES[name])
        axes = tuple(axis for axis in axes if axis not in without)
        parts.append(axes if axes and size % math.prod(mesh.shape[axis] for axis in axes) == 0 else None)
    while parts and parts[-1] is None:
        parts.pop()  # as jit returns shardings: equal shardings must compare as equal
    return PartitionSpec(*parts)


def shardings(tree: Any, mesh: Mesh, leading: tuple[str, ...] = ()) -> Any:
    """Shardings of a tree, which may be abstract: parameters follow their `axes`, all other leaves are replicated.

    The result is a tree prefix of `tree`, which `jax.jit` and `jax.device_put` accept.

    Args:
      tree: a pytree with parameters.
      mesh: device mesh.
      leading: logical names of dims that all parameters have before those of layers.
    """

    def of_leaf(leaf: Any) -> NamedSharding:
        return NamedSharding(mesh, spec(mesh, *_dims(leaf, leading)) if _is_parameter(leaf) else PartitionSpec())

    return jax.tree.map(of_leaf, tree, is_leaf=_is_parameter)


def _is_parameter(leaf: Any) -> bool:
    # In an optimizer state, a parameter that another rule trains has a placeholder instead of an array.
    return isinstance(leaf, nnx.Variable) and hasattr(leaf.get_value(), "shape")


def _dims(parameter: Any, leading: tuple[str, ...] = ()) -> tuple[tuple[int, ...], tuple[str | None, ...]]:
    """Sizes and logical names of a parameter's dims; `leading` names those before the layers."""
    shape, names = parameter.get_value().shape, tuple(parameter.get_metadata()["axes"])
    return shape, leading + ("layers",) * (len(shape) - len(names) - len(leading)) + names


def unsharded_weights(model: Any, mesh: Mesh) -> list[str]:
    """One line for each mesh axis that leaves large weights replicated, because it does not divide their dims.

    Args:
      model: parameters, which may be abstract. Weights of fewer than `LARGE` elements are ignored.
      mesh: device mesh.

    Raises:
      ValueError: if an axis divides no large weight, so that all devices along it would hold the same weights.
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
                f"mesh.{axis}={mesh.shape[axis]} divides no large weight of the model, so all devices along it would "
                f"hold the same weights: {', '.join(weights)}. Choose a divisor of these dims, and use the remaining "
                "devices for mesh.data"
            )
    return [
        f"mesh.{axis}={mesh.shape[axis]} does not split {', '.join(weights)}: all devices along it hold these weights"
        for axis, weights in whole.items()
    ]


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of a batch: its leading dim over `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec(RULES["batch"]))


def num_batch_shards(mesh: Mesh) -> int:
    """Number of shards of a batch: devices along `data` times devices along `fsdp`."""
    return math.prod(mesh.shape[axis] for axis in RULES["batch"])


def padded_size(mesh: Mesh, count: int) -> int:
    """Rows of the smallest batch with room for `count` images. Row i repeats image i % count."""
    return -(-count // num_batch_shards(mesh)) * num_batch_shards(mesh)


def local_rows(mesh: Mesh, batch_size: int) -> tuple[int, ...]:
    """Rows of a global batch that the devices of this process hold, in ascending order.

    Several processes hold the same rows if `tensor` crosses processes.

    Raises:
      ValueError: if the batch cannot be split over the mesh.
    """
    parts = num_batch_shards(mesh)
    if batch_size < 1 or batch_size % parts:
        raise ValueError(f"a batch of {batch_size} does not split over data x fsdp = {parts} devices")
    places = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    return tuple(sorted({row for index in places if index for row in range(*index[0].indices(batch_size))}))


def put_batch(mesh: Mesh, batch: Any, batch_size: int) -> Any:
    """Global arrays of `batch_size` rows, from the rows that each process has.

    Args:
      mesh: devices of all processes.
      batch: a tree of arrays with the `local_rows` of this process.
      batch_size: number of rows of the global batch.

    Raises:
      ValueError: if an array has more or fewer rows.
    """
    sharding, local = batch_sharding(mesh), local_rows(mesh, batch_size)

    def put(leaf: ArrayLike) -> jax.Array:
        rows = np.asarray(leaf)
        if len(rows) != len(local):
            raise ValueError(f"a batch has {len(rows)} rows; this process holds {len(local)} of {batch_size}")

        def shard(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            start, stop, _ = index[0].indices(batch_size)
            first = local.index(start)
            return rows[first : first + stop - start]

        return jax.make_array_from_callback((batch_size, *rows.shape[1:]), sharding, shard)

    return jax.tree.map(put, batch)


@dataclasses.dataclass(frozen=True)
class Constrain:
    """Constrains the sharding of activations by logical names; hashable, so an `Execution` with it can be static.

    Attributes:
      mesh: device mesh.
      without: mesh axes that shard no dim, because a `jax.vmap` around the model maps over them.
      divided: what `tensor` divides, see `DIVIDED`.
    """

    mesh: Mesh
    without: tuple[str, ...] = ()
    divided: Divided = "heads"

    def __call__(self, x: jax.Array, names: tuple[str | None, ...]) -> jax.Array:
        placed = NamedSharding(self.mesh, spec(self.mesh, x.shape, names, self.without, self.divided))
        return jax.lax.with_sharding_constraint(x, placed)


@dataclasses.dataclass(frozen=True)
class Gather:
    """Gathers the weights of a module over `fsdp`; hashable, for `Execution.gather`.

    The backward pass sums each gradient right into the shard that the device keeps.

    Attributes:
      mesh: device mesh.
      divided: what `tensor` divides; unless it is heads, weights are gathered over `tensor` too.
      dtype: dtype in which matrices travel. The result has the dtype of the weight, and so have sums of gradients.
    """

    mesh: Mesh
    divided: Divided = "heads"
    dtype: Any = None

    def __call__(self, module: Module) -> Module:
        over = ("fsdp",) if self.divided == "heads" else ("fsdp", "tensor")

        def whole(weight: nnx.Variable) -> nnx.Variable:
            shape, names = _dims(weight)
            stored, gathered = (spec(self.mesh, shape, names, axes) for axes in ((), over))
            parts = [stored, gathered]
            if self.divided != "heads":  # two axes divide it, and the compiler scatters a sum along one dim only
                parts.insert(1, spec(self.mesh, shape, ["shards" if name == "embed" else None for name in names]))
            steps = tuple(NamedSharding(self.mesh, part) for part in parts)
            dtype = self.dtype if len(names) > 1 and self.dtype is not None else weight.get_value().dtype
            return weight if stored == gathered else weight.replace(_gather(steps, dtype, weight.get_value()))

        return jax.tree.map(whole, module, is_leaf=_is_parameter)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gather(steps: tuple[NamedSharding, ...], dtype: Any, weight: jax.Array) -> jax.Array:
    """The weight, rounded to a dtype, with the last of these shardings; its gradient, not rounded, with the first."""
    rounded = weight.astype(dtype)
    for step in steps:
        rounded = jax.lax.with_sharding_constraint(rounded, step)
    return rounded.astype(weight.dtype)


def _scatter(steps: tuple[NamedSharding, ...], _: Any, __: None, gradient: jax.Array) -> tuple[jax.Array]:
    for step in reversed(steps[:-1]):
        gradient = jax.lax.with_sharding_constraint(gradient, step)
    return (gradient,)


_gather.defvjp(lambda steps, dtype, weight: (_gather(steps, dtype, weight), None), _scatter)


@dataclasses.dataclass(frozen=True)
class Attention:
    """An attention kernel that each device runs on its shard of samples and heads; hashable, for `Execution.kernel`.

    Attributes:
      mesh: device mesh.
      kernel: attention kernel or its name, see `attention.attention`; "auto" chooses by the platform of the devices.
      without, divided: see `Constrain`.
    """

    mesh: Mesh
    kernel: str | attention.Kernel = "auto"
    without: tuple[str, ...] = ()
    divided: Divided = "heads"

    def __call__(
        self,
        q_BSHK: Float[Array, "B S H K"],
        k_BTGK: Float[Array, "B T G K"],
        v_BTGK: Float[Array, "B T G K"],
        visible_until: np.ndarray | None,
        key_valid_BT: Bool[Array, "B T"] | None,
    ) -> Float[Array, "B S H K"]:
        kernel = self.kernel
        if isinstance(kernel, str):
            kernel = attention.choose(kernel, self.mesh.devices.flat[0])
        # The keys' heads decide: if they are too few to be sharded, the heads of their queries must not be sharded.
        divided: Divided = "images" if self.divided == "images" else "heads"
        split = spec(self.mesh, k_BTGK.shape, ("batch", None, "act_heads", None), self.without, divided)
        local = jax.shard_map(
            lambda q, k, v, valid: kernel(q, k, v, visible_until, valid),
            mesh=self.mesh,
            in_specs=(split, split, split, PartitionSpec(*tuple(split)[:1])),
            out_specs=split,
            check_vma=False,  # Pallas kernels do not declare how their outputs vary over the mesh
        )
        return local(q_BSHK, k_BTGK, v_BTGK, key_valid_BT)
