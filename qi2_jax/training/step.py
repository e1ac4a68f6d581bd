"""The training state and the compiled step that advances it."""

import functools
from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from qi2_jax import sharding

# (model, static, batch, key) -> (loss, further scalars). `static` decides the compiled program, e.g. a layout.
Loss = Callable[[Any, Any, Any, Array], tuple[Float[Array, ""], dict[str, Float[Array, ""]]]]


class TrainState(NamedTuple):
    """Everything that a step changes; parameters, moments and EMA in fp32."""

    step: Int[Array, ""]
    model: Any
    optimizer: optax.OptState
    ema: Any
    skipped: Int[Array, ""]  # steps left out in a row because loss or gradient was not finite


MAX_SETTING = 1e12  # of an optimizer: beyond it a number is a mistake, and fp32 ends at 3e38


def make_optimizer(config: Mapping[str, Any]) -> optax.GradientTransformation:
    """Adam with decoupled weight decay on matrices, linear warm-up, and clipping by the global norm.

    Args:
      config: `lr`, `betas`, `eps`, `weight_decay`, `clip`, `warmup` (steps), `decay_steps` (0: constant; otherwise
        cosine to zero over that many steps, the warm-up included).

    Raises:
      ValueError: for a value out of its range.
    """
    for key in ("lr", "eps", "weight_decay", "clip", "warmup", "decay_steps"):
        least = "above" if key in ("lr", "eps", "clip") else "at least"
        if not (config[key] > 0 or (config[key] == 0 and least == "at least")) or config[key] > MAX_SETTING:
            raise ValueError(f"optimizer.{key} is {config[key]}; it must be {least} 0 and at most {MAX_SETTING:g}")
    if len(config["betas"]) != 2 or not all(0 <= beta < 1 for beta in config["betas"]):
        raise ValueError(f"optimizer.betas are {config['betas']}; two numbers in [0, 1) are needed")
    if 0 < config["decay_steps"] <= config["warmup"]:
        raise ValueError(
            f"optimizer.warmup is {config['warmup']}; it must end before optimizer.decay_steps {config['decay_steps']}"
        )
    if config["decay_steps"]:
        rate = optax.warmup_cosine_decay_schedule(0.0, config["lr"], config["warmup"], config["decay_steps"])
    else:
        rate = optax.join_schedules(
            [optax.linear_schedule(0.0, config["lr"], config["warmup"]), optax.constant_schedule(config["lr"])],
            [config["warmup"]],
        )
    b1, b2 = config["betas"]
    adam = optax.adamw(rate, b1, b2, config["eps"], weight_decay=config["weight_decay"], mask=_is_matrix)
    return optax.chain(optax.clip_by_global_norm(config["clip"]), adam)


def _is_matrix(model: Any) -> Any:
    """True where weight decay applies: weights of linear layers and convolutions, not norms and biases."""
    return jax.tree.map(
        lambda leaf: leaf.replace(len(leaf.get_metadata()["axes"]) > 1),
        model,
        is_leaf=lambda leaf: isinstance(leaf, nnx.Variable),
    )


def init_state(
    make_model: Callable[[Array], Any], optimizer: optax.GradientTransformation, key: Array, mesh: Mesh
) -> TrainState:
    """A fresh state, every leaf created where it lives."""

    def init(key):
        model = make_model(key)
        ema = jax.tree.map(jnp.copy, model)
        return TrainState(jnp.int32(0), model, optimizer.init(model), ema, jnp.int32(0))

    placed = sharding.shardings(jax.eval_shape(init, key), mesh)
    return jax.jit(init, out_shardings=placed)(key)


def abstract_state(
    make_model: Callable[[Array], Any], optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """Shapes, dtypes and shardings of the state, without memory: what a restore or a compilation needs."""

    def init(key):
        model = make_model(key)
        return TrainState(jnp.int32(0), model, optimizer.init(model), model, jnp.int32(0))

    shapes = jax.eval_shape(init, jax.random.key(0))
    return jax.tree.map(
        lambda place, part: jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), part
        ),
        sharding.shardings(shapes, mesh),
        shapes,
    )


def make_train_step(
    loss: Loss, optimizer: optax.GradientTransformation, ema_decay: float, seed: int, mesh: Mesh
) -> jax.stages.Wrapped:
    """The jitted step `(state, static, batch) -> (state, metrics)`; the old state's memory is reused.

    Randomness depends on (seed, step) alone. A step whose loss or gradient is not finite changes nothing but the
    counters, and says so in the metrics.
    """

    @functools.partial(jax.jit, static_argnums=1, donate_argnums=0)
    def train_step(state: TrainState, static: Hashable, batch: Any) -> tuple[TrainState, dict[str, Array]]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        (value, scalars), gradients = jax.value_and_grad(loss, has_aux=True)(state.model, static, batch, key)
        gradient_norm = optax.tree.norm(gradients)
        finite = jnp.isfinite(value) & jnp.isfinite(gradient_norm)

        updates, moments = optimizer.update(gradients, state.optimizer, state.model)
        model = optax.apply_updates(state.model, updates)
        ema = jax.tree.map(lambda old, new: old + (1 - ema_decay) * (new - old), state.ema, model)

        def keep_if_finite(new, old):
            return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)

        new_state = TrainState(
            state.step + 1,
            keep_if_finite(model, state.model),
            keep_if_finite(moments, state.optimizer),
            keep_if_finite(ema, state.ema),
            jnp.where(finite, 0, state.skipped + 1),
        )
        # The state leaves a step as it enters it: otherwise the second call would compile another program.
        new_state = jax.lax.with_sharding_constraint(new_state, sharding.shardings(new_state, mesh))
        metrics = {
            "loss": value,
            "gradient_norm": gradient_norm,
            "parameter_norm": optax.tree.norm(state.model),
            "skipped": new_state.skipped,
            **scalars,
        }
        return new_state, metrics

    return train_step
