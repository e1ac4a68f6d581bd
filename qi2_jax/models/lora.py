"""Low-rank adapters (LoRA) on the linear layers of a model.

An adapted layer computes `W x + alpha / rank * B A x` with W frozen (Hu et al., 2021, section 4.1). An adapter is a
separate tree, {path of a linear layer: `LowRank`}, and training differentiates, averages and saves this tree alone.

We do not use qwix (0.1.8): it adds random state and parameters to modules while the model runs. That fails under
`lax.scan` over stacked blocks, where a block exists only as a temporary slice.
"""

import dataclasses
import fnmatch
import math
from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from qi2_jax.models import tree
from qi2_jax.models.layers import Axes, Linear, keys, stacked

Model = TypeVar("Model")


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """The layers that an adapter changes, and the size of its changes.

    Attributes:
      rank: rank of each layer's change.
      alpha: numerator of the scale `alpha / rank` of each change.
      targets: paths of linear layers such as "blocks.attn.q"; `*` stands for any text, as in "blocks.*".

    Raises:
      ValueError: for a value out of range.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]

    def __post_init__(self) -> None:
        if type(self.rank) is not int or self.rank < 1:
            raise ValueError(f"lora.rank is {self.rank!r}; it must be a positive integer")
        if type(self.alpha) not in (int, float) or not 0 < self.alpha < math.inf:
            raise ValueError(f"lora.alpha is {self.alpha!r}; it must be a finite number above 0")
        if not isinstance(self.targets, tuple) or not self.targets or not all(type(t) is str for t in self.targets):
            raise ValueError(f"lora.targets are {self.targets!r}; a tuple of layer paths such as 'blocks.*' is needed")

    @property
    def scale(self) -> float:
        """Factor of every change."""
        return self.alpha / self.rank


class LowRank(nnx.Module):
    """The change of one linear layer, `scale * B A x` with A [rank, in] and B [out, rank].

    B is initialised with zeros, so a fresh adapter changes nothing. A is initialised with peft's variance, a third of
    that of a `Linear`. The tensors have peft's names.
    """

    def __init__(self, in_dim: int, out_dim: int, config: LoRAConfig, *, key: Array, axes: Axes):
        rng = keys(key)
        self.lora_A = Linear(in_dim, config.rank, key=next(rng), axes=(None, axes[1]), gain=3**-0.5)
        self.lora_B = Linear(config.rank, out_dim, key=next(rng), axes=(axes[0], None), gain=0.0)
        self.scale = config.scale

    def __call__(self, x: Float[Array, "... I"]) -> Float[Array, "... O"]:
        return self.lora_B(self.scale * self.lora_A(x))


Adapter = dict[str, LowRank]


class Adapted(nnx.Module):
    """A linear layer and its change, in the place of the layer."""

    def __init__(self, base: Linear, change: LowRank):
        self.base, self.change = base, change

    def __call__(self, x: Float[Array, "... I"]) -> Float[Array, "... O"]:
        return self.base(x) + self.change(x)


def _is_linear(node: Any) -> bool:
    return isinstance(node, Linear)


def linears(model: Any) -> dict[str, Linear]:
    """{path: linear layer} of a model, which may be abstract; a stack of layers counts as one."""
    nodes = jax.tree_util.tree_flatten_with_path(model, is_leaf=_is_linear)[0]
    return {tree.leaf_name(path): node for path, node in nodes if _is_linear(node)}


def targets(base: Any, config: LoRAConfig) -> list[str]:
    """Paths of the layers that a configuration selects, in the order of the model.

    Raises:
      ValueError: for targets that match no layer; the message has them and all paths.
    """
    existing = list(linears(base))
    unknown = [pattern for pattern in config.targets if not fnmatch.filter(existing, pattern)]
    if unknown:
        raise ValueError(f"lora.targets {unknown} match no linear layer; the model has {existing}")
    return [path for path in existing if any(fnmatch.fnmatchcase(path, pattern) for pattern in config.targets)]


def init(base: Any, config: LoRAConfig, *, key: Array) -> Adapter:
    """A fresh adapter in fp32, stacked where the layers are stacked.

    Args:
      base: model to adapt; may be abstract.
      config: layers and rank.
      key: random key of all A.

    Raises:
      ValueError: as `targets`.
    """
    rng, existing = keys(key), linears(base)

    def change(linear: Linear) -> LowRank:
        *layers, out_dim, in_dim = linear.weight.shape
        axes = linear.weight.get_metadata()["axes"]

        def make(key: Array) -> LowRank:
            return LowRank(in_dim, out_dim, config, key=key, axes=axes)

        return stacked(make, layers[0], next(rng)) if layers else make(next(rng))

    return {path: change(existing[path]) for path in targets(base, config)}


def abstract(base: Any, config: LoRAConfig) -> Adapter:
    """Shapes and dtypes of the adapter; raises as `init`."""
    return jax.eval_shape(lambda: init(base, config, key=jax.random.key(0)))


def join(base: Model, adapter: Adapter) -> Model:
    """A model that computes every change beside its layer, without forming the product `B A`.

    The result can be differentiated with respect to either argument.

    Raises:
      ValueError: if the adapter changes layers that the base does not have.
    """
    return _replaced(base, adapter, Adapted)


def merge(base: Model, adapter: Adapter) -> Model:
    """The base with `W + scale * B A` in the place of W, computed in fp32 and stored in W's dtype.

    It forms the changes of a whole stack at once, unlike `qi2_jax.interop.lora.merging.merged`, which forms one at a
    time.

    Raises:
      ValueError: as `join`.
    """

    def merged(linear: Linear, change: LowRank) -> Linear:
        a, b = (part.weight[...].astype(jnp.float32) for part in (change.lora_A, change.lora_B))
        delta = jnp.einsum("...or,...ri->...oi", b, a, precision="highest")
        weight = linear.weight[...]
        copy = jax.tree.map(lambda leaf: leaf, linear)
        copy.weight = linear.weight.replace((weight.astype(jnp.float32) + change.scale * delta).astype(weight.dtype))
        return copy

    return _replaced(base, adapter, merged)


def _replaced(base: Any, adapter: Mapping[str, LowRank], replace: Any) -> Any:
    """The base with `replace(layer, change)` in the place of every adapted layer."""
    existing = linears(base)
    if unknown := sorted(adapter.keys() - existing.keys()):
        raise ValueError(f"the adapter changes {unknown}; the model has the linear layers {list(existing)}")

    def change(path: tuple[Any, ...], node: Any) -> Any:
        name = tree.leaf_name(path)
        return replace(node, adapter[name]) if name in adapter else node

    return jax.tree_util.tree_map_with_path(change, base, is_leaf=_is_linear)
