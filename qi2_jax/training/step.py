"""The training state and the compiled programs that advance it.

One update of the parameters reads one microbatch, or several (gradient accumulation). Microbatches of any number of
images, areas and tasks add up to the mean over all images of the update. Randomness depends on (seed, step, index of
the image in its update), so the number of microbatches makes no difference.

Dims: `B` images of a microbatch, `L` layers, `R` replicas.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key

from qi2_jax import sharding
from qi2_jax.models import tree
from qi2_jax.training.mean import Mean
from qi2_jax.training.optimizer import Optimizer

Tree = TypeVar("Tree")
Scalars = dict[str, Float[Array, ""] | Mean]
# (model, frozen, layout, batch, keys_B) -> (mean loss over the images, further metrics). A metric is a mean over the
# images, or a `Mean` whose total and count are both divided by the number of images. `frozen` has arrays that
# training reads and never changes; `layout` is static and selects the compiled program.
Loss = Callable[[Any, Any, Any, Any, Key[Array, "B"]], tuple[Float[Array, ""], Scalars]]

IsTrained = Callable[[str], bool]  # of a parameter, by its dotted name

LAYER_GROUPS = 8  # number of groups in which the norms of stacked layers are reported


class TrainState(NamedTuple):
    """Everything that an update changes; parameters, moments and EMA in fp32."""

    step: Int[Array, ""]
    model: Any
    optimizer: optax.OptState
    ema: Any
    skipped: Int[Array, ""]  # consecutive updates that were skipped because loss or gradient was not finite
    skipped_total: Int[Array, ""]  # all such updates since step 0


class Sums(NamedTuple):
    """Sums over the microbatches of an update, each weighted by its share of the images.

    With several replicas, gradients have a leading dim `R` with one of each.
    """

    gradients: Any
    loss: Float[Array, ""]
    scalars: Scalars


def make_optimizer(config: Optimizer) -> optax.GradientTransformation:
    """Adam or Muon with decoupled weight decay on matrices, linear warm-up, and clipping by the global norm."""
    b1, b2 = config.betas
    rate = learning_rate(config)
    if config.kind == "adam":
        rule = optax.adamw(rate, b1, b2, config.eps, weight_decay=config.weight_decay, mask=_is_matrix)
    else:
        rule = optax.contrib.muon(
            rate,
            beta=config.momentum,
            eps=config.eps,
            weight_decay=config.weight_decay,
            adam_b1=b1,
            adam_b2=b2,
            adam_learning_rate=learning_rate(dataclasses.replace(config, lr=config.adam_lr)),
            muon_weight_dimension_numbers=_matrix_dims,
        )
    return optax.chain(optax.clip_by_global_norm(config.clip), rule)


def learning_rate(config: Optimizer) -> optax.Schedule:
    """The rate of update n, counted from 0, see `make_optimizer`.

    It is `lr * (n + 1) / warmup` at first, then constant or a cosine that reaches zero at `decay_steps`.
    """
    rate, warmup, end = config.lr, config.warmup, config.decay_steps
    after = optax.cosine_decay_schedule(rate, end - warmup) if end else optax.constant_schedule(rate)
    if not warmup:
        return after
    # The ramp has one unused extra step, because optax rejects a ramp of zero steps.
    rise = optax.linear_schedule(rate / warmup, rate / warmup + rate, warmup)
    return optax.join_schedules([rise, after], [warmup])


def _is_matrix(model: Any) -> Any:
    """True where weight decay applies: weights of linear layers and convolutions, not norms and biases."""
    return jax.tree.map(
        lambda leaf: leaf.replace(len(leaf.get_metadata()["axes"]) > 1),
        model,
        is_leaf=lambda leaf: isinstance(leaf, nnx.Variable),
    )


def _matrix_dims(model: Any) -> Any:
    """The dims of every weight that Muon orthogonalises, and None for those that Adam trains.

    Outputs are the first dim and inputs all others: a convolution [O, C, k, k] is a matrix of O rows and C * k * k
    columns. The layers of a stack are separate matrices. The scale of a norm is a vector, even if it is stored as
    [C, 1, 1].
    """

    def dims(leaf: nnx.Variable) -> nnx.Variable:
        count = len(leaf.get_metadata()["axes"])
        shape = getattr(leaf.get_value(), "shape", ())  # a masked leaf has none
        if math.prod(shape[len(shape) - count + 1 :]) == 1:
            return leaf.replace(None)
        return leaf.replace(optax.contrib.MuonDimensionNumbers(tuple(range(1 - count, 0)), -count))

    return jax.tree.map(dims, model, is_leaf=_is_variable)


def init_state(
    make_model: Callable[[Array], Any], optimizer: optax.GradientTransformation, key: Array, mesh: Mesh
) -> TrainState:
    """A fresh state, whose leaves are created with their shardings."""
    init = functools.partial(_init, make_model, optimizer)
    placed = sharding.shardings(jax.eval_shape(init, key), mesh)
    return jax.jit(init, out_shardings=placed)(key)


def abstract_state(
    make_model: Callable[[Array], Any], optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """Shapes, dtypes and shardings of the state, for a restore or a compilation. It takes no memory."""
    shapes = jax.eval_shape(functools.partial(_init, make_model, optimizer), jax.random.key(0))
    return abstract(shapes, sharding.shardings(shapes, mesh))


def abstract(tree: Any, placed: Any) -> Any:
    """Shapes and dtypes of a tree's arrays, with shardings from the result of `sharding.shardings`."""
    like = lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)  # noqa: E731
    return jax.tree.map(lambda place, part: jax.tree.map(lambda leaf: like(leaf, place), part), placed, tree)


def _init(make_model: Callable[[Array], Any], optimizer: optax.GradientTransformation, key: Array) -> TrainState:
    model = make_model(key)
    ema = jax.tree.map(jnp.copy, model)
    return TrainState(jnp.int32(0), model, optimizer.init(model), ema, jnp.int32(0), jnp.int32(0))


class Programs(NamedTuple):
    """The functions that advance a state. `compiled.Compiled` compiles and calls them.

    Attributes:
      step: `(state, frozen, layout, batch) -> (state, metrics)`, an update from one microbatch. The memory of the old
        state is reused.
      gradient: `(state, frozen, layout, batch, first) -> sums` of one microbatch, where `first` is the index of its
        first image in the update; not jitted.
      add: `(state, sums, frozen, layout, batch, first, weight) -> (sums, loss)`, which adds the gradient of one
        microbatch, times its share of the images, to those before it.
      apply: `(state, sums) -> (state, metrics)`, the update from several microbatches.
    """

    step: jax.stages.Wrapped
    gradient: Callable[..., Sums]
    add: jax.stages.Wrapped
    apply: jax.stages.Wrapped


RAMP = 10  # with a larger value the EMA decay ramps up more slowly


def make_programs(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    ema_decay: float,
    seed: int,
    mesh: Mesh,
    *,
    ema_ramp: bool = False,
    trained: Callable[[Any], IsTrained | None] = lambda layout: None,
    prepare: Callable[[Any, Any, Any], Any] = lambda frozen, layout, batch: batch,
    replicas: int = 1,
    sum_dtype: Any = jnp.float32,
) -> Programs:
    """Makes the programs of a training run.

    An update whose loss or gradient is not finite changes only the counters, which are part of the metrics. Gradients
    are added up across replicas once in an update, because a slow network may connect these.

    Args:
      loss: loss of the task.
      optimizer: result of `make_optimizer`.
      ema_decay: weight of the previous EMA in an update.
      seed: seed of the random keys that the loss receives.
      mesh: devices of the run.
      ema_ramp: whether the decay of update n, counted from 0 without skipped updates, is at most (1 + n) / (10 + n), as
        in TensorFlow's ExponentialMovingAverage with `num_updates`. The EMA then spans about a tenth of the updates so
        far, until `ema_decay` is smaller. It is for parameters that start at random or at zero.
      trained, prepare, replicas, sum_dtype: see `Task`. `add` refuses layouts that do not train all parameters.
    """
    gradient = _gradient_of(loss, seed, trained, prepare, replicas)

    def apply(state: TrainState, sums: Sums, is_trained: IsTrained | None = None) -> tuple[TrainState, Scalars]:
        if replicas > 1:
            sums = sums._replace(gradients=_mean_of_replicas(sums.gradients, sum_dtype, mesh))
        new_state, updates = _advance(state, sums, optimizer, ema_decay, ema_ramp, is_trained)
        # The shardings of the state must not change, or the second call would need another program.
        new_state = _placed(new_state, mesh)
        return new_state, _metrics(state, new_state, updates, sums)

    @functools.partial(jax.jit, static_argnums=2, donate_argnums=0)
    def step(state: TrainState, frozen: Any, layout: Hashable, batch: Any) -> tuple[TrainState, Scalars]:
        return apply(state, gradient(state, frozen, layout, batch, 0), trained(layout))

    @functools.partial(jax.jit, static_argnums=3, donate_argnums=1)
    def add(
        state: TrainState,
        sums: Sums,
        frozen: Any,
        layout: Hashable,
        batch: Any,
        first: Int[Array, ""],
        weight: Float[Array, ""],
    ) -> tuple[Sums, Float[Array, ""]]:
        if trained(layout):
            raise ValueError(f"a batch of {layout} trains only some parameters, so it must be a whole update")
        more = gradient(state, frozen, layout, batch, first)
        total = jax.tree.map(lambda total, value: total + weight * value, sums, more)
        return _placed(total, mesh, leading_dims(replicas)), more.loss

    return Programs(step, gradient, add, jax.jit(apply, donate_argnums=(0, 1)))


def _gradient_of(
    loss: Loss,
    seed: int,
    trained: Callable[[Any], IsTrained | None],
    prepare: Callable[[Any, Any, Any], Any],
    replicas: int,
) -> Callable[..., Sums]:
    """The function `Programs.gradient`; see `make_programs`."""
    differentiate = jax.value_and_grad(loss, has_aux=True)

    def gradient(state: TrainState, frozen: Any, layout: Hashable, batch: Any, first: Int[Array, ""] | int) -> Sums:
        images = jax.tree.leaves(batch)[0].shape[0]
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        keys_B = jax.vmap(lambda place: jax.random.fold_in(key, place))(first + jnp.arange(images))
        batch = prepare(frozen, layout, batch)
        if replicas == 1:
            (value, scalars), gradients = differentiate(state.model, frozen, layout, batch, keys_B)
            return Sums(_zeroed(trained(layout), gradients), value, scalars)
        parts = jax.tree.map(lambda leaf: leaf.reshape(replicas, -1, *leaf.shape[1:]), (batch, keys_B))
        of_part = lambda batch, keys_B: differentiate(state.model, frozen, layout, batch, keys_B)  # noqa: E731
        (value, scalars), gradients = jax.vmap(of_part, spmd_axis_name=sharding.RULES["replicas"])(*parts)
        value, scalars = jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), (value, scalars))
        return Sums(_zeroed(trained(layout), gradients), value, scalars)

    return gradient


def leading_dims(replicas: int) -> tuple[str, ...]:
    """Logical names of the dims that gradients have before those of their parameters, see `Sums`."""
    return ("replicas",) if replicas > 1 else ()


def _metrics(state: TrainState, new_state: TrainState, updates: Any, sums: Sums) -> Scalars:
    """The metrics of an update."""
    return {
        "loss": sums.loss,
        "skipped": new_state.skipped,
        "skipped_total": new_state.skipped_total,
        **norms("gradient_norm", sums.gradients),
        **norms("parameter_norm", state.model),
        **norms("update_norm", updates),
        **sums.scalars,
    }


def _placed(leaves: Tree, mesh: Mesh, leading: tuple[str, ...] = ()) -> Tree:
    return jax.lax.with_sharding_constraint(leaves, sharding.shardings(leaves, mesh, leading))


def _mean_of_replicas(gradients: Tree, dtype: Any, mesh: Mesh) -> Tree:
    # `jnp.mean` would add up in fp32, whatever the dtype.
    means = jax.tree.map(lambda leaf: jax.lax.reduce_sum((leaf / leaf.shape[0]).astype(dtype), (0,)), gradients)
    return jax.tree.map(lambda mean, leaf: mean.astype(leaf.dtype), _placed(means, mesh), gradients)


def _zeroed(is_trained: IsTrained | None, leaves: Tree) -> Tree:
    """Zeros for parameters that are not trained."""
    return _choose(is_trained, leaves, jax.tree.map(jnp.zeros_like, leaves)) if is_trained else leaves


def _choose(is_chosen: IsTrained, leaves: Tree, others: Tree) -> Tree:
    """The leaves with chosen names, and otherwise those of another tree."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf, other: leaf if is_chosen(tree.leaf_name(path)) else other, leaves, others
    )


def _advance(
    state: TrainState,
    sums: Sums,
    optimizer: optax.GradientTransformation,
    ema_decay: float,
    ema_ramp: bool,
    is_trained: IsTrained | None,
) -> tuple[TrainState, Any]:
    """The next state, and the updates of the parameters. Only the counters change if `sums` is not finite."""
    gradient_norm = optax.tree.norm(sums.gradients)
    finite = jnp.isfinite(sums.loss) & jnp.isfinite(gradient_norm)
    updates, moments = optimizer.update(sums.gradients, state.optimizer, state.model)
    model = optax.apply_updates(state.model, updates)
    if is_trained:  # momentum and weight decay move parameters without a gradient too
        updates, model = _zeroed(is_trained, updates), _choose(is_trained, model, state.model)
    ramp = (RAMP - 1) / (RAMP + state.step - state.skipped_total) if ema_ramp else 0.0
    share = jnp.maximum(1 - ema_decay, ramp)
    ema = jax.tree.map(lambda old, new: old + share * (new - old), state.ema, model)

    def keep_if_finite(new: Tree, old: Tree) -> Tree:
        return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)

    new_state = TrainState(
        state.step + 1,
        keep_if_finite(model, state.model),
        keep_if_finite(moments, state.optimizer),
        keep_if_finite(ema, state.ema),
        jnp.where(finite, 0, state.skipped + 1),
        state.skipped_total + jnp.where(finite, 0, 1),
    )
    return new_state, updates


def norms(name: str, model: Any) -> dict[str, Float[Array, ""]]:
    """Euclidean norms of a tree of parameters: `name` for the whole tree, `name/GROUP` for each group of leaves.

    A group is the first part of the leaves' names, such as `text_in`. Stacked layers form at most `LAYER_GROUPS` groups
    such as `blocks_00-03`.
    """
    squares: dict[str, Array] = {}
    for path, variable in jax.tree_util.tree_flatten_with_path(model, is_leaf=_is_variable)[0]:
        part = tree.leaf_name(path).split(".")[0]
        value = variable.get_value() if _is_variable(variable) else variable
        stacked = _is_variable(variable) and value.ndim > len(variable.get_metadata()["axes"])
        values = jnp.square(value.astype(jnp.float32))
        if not stacked:
            squares[part] = squares.get(part, 0.0) + jnp.sum(values)
            continue
        layers_L = jnp.sum(values, axis=tuple(range(1, values.ndim)))
        size = math.ceil(len(layers_L) / LAYER_GROUPS)
        for start in range(0, len(layers_L), size):
            group = f"{part}_{start:02d}-{min(start + size, len(layers_L)) - 1:02d}"
            squares[group] = squares.get(group, 0.0) + jnp.sum(layers_L[start : start + size])
    return {name: jnp.sqrt(sum(squares.values()))} | {f"{name}/{group}": jnp.sqrt(x) for group, x in squares.items()}


def _is_variable(leaf: Any) -> bool:
    return isinstance(leaf, nnx.Variable)
