"""The training loop: start or resume, step, evaluate, save; the same for every task."""

import dataclasses
import pathlib
import signal
import threading
from collections.abc import Callable, Hashable, Iterator
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import Mesh

from qi2_jax import config as configs
from qi2_jax import lock, sharding
from qi2_jax.training import step as steps
from qi2_jax.training.checkpoint import Checkpoints
from qi2_jax.training.metrics import Metrics, Progress, Stopwatch

MAX_SEED = 1 << 32  # random keys know no more bits

# Keys that may change between the runs of one directory: they move the end or the reporting, not the mathematics.
MAY_CHANGE = ("train.steps", "train.log_every", "train.evaluate_every", "checkpoint.every", "checkpoint.keep", "mesh.")


LEAST = {
    "train": {"steps": 1, "log_every": 1, "evaluate_every": 1, "max_skipped": 1},
    "checkpoint": {"every": 1, "keep": 1},
}


class Feed(NamedTuple):
    """What one step reads.

    Attributes:
      static: decides the compiled program, e.g. a layout.
      rows: this process's rows of the batch, as host arrays.
      batch_size: global number of samples.
      composition: facts about the batch, for the logs.
    """

    static: Hashable
    rows: Any
    batch_size: int
    composition: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Task:
    """What is trained on what.

    Attributes:
      name: shown in front of the progress bar.
      make_model: builds the model from a random key.
      loss: see `step.Loss`.
      batches: what the steps after the given one read, without end.
      data: what the batches come from, as plain JSON; a run continues on the same data only.
      prepare: (static, rows on the mesh) -> what the loss reads, where that takes another program.
      evaluate: scalars of a state, at the first and last step and every `train.evaluate_every`.
    """

    name: str
    make_model: Callable[[jax.Array], Any]
    loss: steps.Loss
    batches: Callable[[int], Iterator[Feed]]
    data: dict[str, Any]
    evaluate: Callable[[steps.TrainState], dict[str, Any]] | None = None
    prepare: Callable[[Any, Any], Any] = lambda static, rows: rows


class NonFiniteError(FloatingPointError):
    """Too many steps in a row had a loss or gradient that is not finite."""


def train(task: Task, config: Any, directory: pathlib.Path, mesh: Mesh) -> steps.TrainState:
    """Trains to `config.train.steps`, continuing from the newest checkpoint in `directory` if there is one.

    The directory receives `config.json`, `metrics.jsonl` and `checkpoints/`. SIGTERM saves and exits with status 0;
    the same call continues later, also after a kill at any moment.

    Args:
      task: what to train.
      config: an experiment config with `seed`, `train`, `optimizer` and `checkpoint`.
      directory: the run.
      mesh: devices of this and the other processes.

    Returns:
      The state after the last step.

    Raises:
      ValueError: if the directory belongs to another config or other data, another process trains in it, or its
        checkpoint does not fit the model.
      NonFiniteError: after `train.max_skipped` steps in a row that were not finite; the state is saved first.
    """
    optimizer = check(config)
    with lock.hold(directory):
        return _train(task, config, directory, mesh, optimizer)


def _train(
    task: Task, config: Any, directory: pathlib.Path, mesh: Mesh, optimizer: optax.GradientTransformation
) -> steps.TrainState:
    # --- where we are: nothing is written before everything is known to fit
    checkpoints = Checkpoints(directory / "checkpoints", config.checkpoint.keep)
    found = checkpoints.latest()
    asked = {**configs.to_dict(config), "data": task.data}
    may_change = MAY_CHANGE if found is not None else tuple(asked)  # without a checkpoint nothing has begun
    configs.claim(directory / "config.json", asked, may_change, write=False)

    # --- state: resumed or fresh
    if found is None:
        state = steps.init_state(task.make_model, optimizer, jax.random.key(config.seed), mesh)
    else:
        state = checkpoints.restore(steps.abstract_state(task.make_model, optimizer, mesh), found)
    configs.claim(directory / "config.json", asked, may_change, write=jax.process_index() == 0)
    start, total = int(state.step), config.train.steps
    train_step = steps.make_train_step(task.loss, optimizer, config.ema_decay, config.seed, mesh)
    metrics = Metrics(directory / "metrics.jsonl", start)

    def evaluate(step):
        if task.evaluate is not None:
            values = task.evaluate(state)
            metrics.write(step, values)
            progress.note(f"step {step}: " + ", ".join(f"{name} {value:.4f}" for name, value in values.items()))

    # --- steps
    if start >= total and _is_lost(state, config):
        checkpoints.close()
        raise NonFiniteError(_lost(state, checkpoints.directory))
    progress, watch = Progress(task.name, start, total), Stopwatch()
    batches = task.batches(start)
    with _Termination() as termination:
        try:
            if start == 0:
                evaluate(0)
            for step in range(start + 1, total + 1):
                with watch.measure("data"):
                    feed = next(batches)
                rows = task.prepare(feed.static, sharding.put_batch(mesh, feed.rows, feed.batch_size))
                state, values = train_step(state, feed.static, rows)
                logged = step % config.train.log_every == 0 or step == total
                progress.advance(feed.batch_size, values if logged else None)
                if logged:
                    metrics.write(step, {**values, **feed.composition, **watch.lap()})
                if (logged or step % config.train.max_skipped == 0) and _is_lost(state, config):
                    checkpoints.save(state)
                    raise NonFiniteError(_lost(state, checkpoints.directory))
                last = step == total
                if step % config.train.evaluate_every == 0 or last:
                    evaluate(step)
                if step % config.checkpoint.every == 0 or last or termination.requested:
                    checkpoints.save(state)
                if termination.requested:
                    progress.note(f"SIGTERM: saved step {step} in {checkpoints.directory}; run again to continue")
                    break
        finally:
            progress.close()
            checkpoints.close()
    if termination.requested:
        raise SystemExit(0)
    return state


def check(config: Any) -> optax.GradientTransformation:
    """The optimizer of a stage's config, after checking everything in the config that the loop reads.

    Raises:
      ValueError: naming a value out of its range.
    """
    for group, keys in LEAST.items():
        for key, least in keys.items():
            if config[group][key] < least:
                raise ValueError(f"{group}.{key} is {config[group][key]}; it must be at least {least}")
    if not 0 <= config.seed < MAX_SEED:
        raise ValueError(f"seed is {config.seed}; it must be at least 0 and below {MAX_SEED}")
    if not 0 <= config.ema_decay < 1:
        raise ValueError(f"ema_decay is {config.ema_decay}; it must be at least 0 and below 1")
    if 0 < config.optimizer.decay_steps < config.train.steps:
        raise ValueError(
            f"train.steps {config.train.steps} goes beyond optimizer.decay_steps {config.optimizer.decay_steps}, where "
            "the learning rate has come to zero: take fewer steps, or in a new run more decay_steps or 0, which keeps "
            "the rate"
        )
    return steps.make_optimizer(config.optimizer)


def _is_lost(state: steps.TrainState, config: Any) -> bool:
    return int(state.skipped) >= config.train.max_skipped


def _lost(state: steps.TrainState, directory: pathlib.Path) -> str:
    return (
        f"{int(state.skipped)} steps in a row up to step {int(state.step)} were not finite; the state is saved in "
        f"{directory}. Look at the data of these steps, or begin another run with a lower optimizer.lr"
    )


class _Termination:
    """Remembers a SIGTERM while the loop runs, so that it can save before it leaves."""

    def __enter__(self):
        self.requested = False
        self._main = threading.current_thread() is threading.main_thread()
        if self._main:
            self._previous = signal.signal(signal.SIGTERM, self._request)
        return self

    def _request(self, signum, frame):
        self.requested = True

    def __exit__(self, *error):
        if self._main:
            signal.signal(signal.SIGTERM, self._previous)
