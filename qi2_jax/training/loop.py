"""The training loop: start or resume, step, evaluate, save; the same for every task."""

import dataclasses
import pathlib
import signal
import threading
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import jax
from jax.sharding import Mesh

from qi2_jax import config as configs
from qi2_jax import sharding
from qi2_jax.training import step as steps
from qi2_jax.training.checkpoint import Checkpoints
from qi2_jax.training.metrics import Metrics, Progress

# Keys that may change between the runs of one directory: they move the end or the reporting, not the mathematics.
MAY_CHANGE = ("train.steps", "train.log_every", "train.evaluate_every", "checkpoint.every", "checkpoint.keep", "mesh.")


@dataclasses.dataclass(frozen=True)
class Task:
    """What is trained on what.

    Attributes:
      name: shown in front of the progress bar.
      make_model: builds the model from a random key.
      loss: see `step.Loss`.
      batches: from a step on, the endless sequence of (static, this process's rows of the batch).
      batch_size: global number of samples per step.
      data: what the batches come from, as plain JSON; a run continues on the same data only.
      evaluate: scalars of a state, at the first and last step and every `train.evaluate_every`.
    """

    name: str
    make_model: Callable[[jax.Array], Any]
    loss: steps.Loss
    batches: Callable[[int], Iterator[tuple[Hashable, Any]]]
    batch_size: int
    data: dict[str, Any]
    evaluate: Callable[[steps.TrainState], dict[str, Any]] | None = None


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
      ValueError: if the directory belongs to another config or other data, or its checkpoint does not fit the model.
      NonFiniteError: after `train.max_skipped` steps in a row that were not finite; the state is saved first.
    """
    # --- where we are
    for key, least in (("steps", 0), ("log_every", 1), ("evaluate_every", 1), ("max_skipped", 1)):
        if config.train[key] < least:
            raise ValueError(f"train.{key} is {config.train[key]}; it must be at least {least}")
    for key in ("every", "keep"):
        if config.checkpoint[key] < 1:
            raise ValueError(f"checkpoint.{key} is {config.checkpoint[key]}; it must be at least 1")
    directory.mkdir(parents=True, exist_ok=True)
    configs.claim(
        directory / "config.json",
        {**configs.to_dict(config), "data": task.data},
        MAY_CHANGE,
        write=jax.process_index() == 0,
    )
    if 0 < config.optimizer.decay_steps < config.train.steps:
        raise ValueError(
            f"train.steps {config.train.steps} goes beyond optimizer.decay_steps {config.optimizer.decay_steps}, where "
            "the learning rate has come to zero; raise decay_steps too, or set it to 0 for a constant rate"
        )
    optimizer = steps.make_optimizer(config.optimizer)
    checkpoints = Checkpoints(directory / "checkpoints", config.checkpoint.keep)
    found = checkpoints.latest()

    # --- state: resumed or fresh
    if found is None:
        state = steps.init_state(task.make_model, optimizer, jax.random.key(config.seed), mesh)
    else:
        state = checkpoints.restore(steps.abstract_state(task.make_model, optimizer, mesh), found)
    start, total = int(state.step), config.train.steps
    train_step = steps.make_train_step(task.loss, optimizer, config.ema_decay, config.seed, mesh)
    metrics = Metrics(directory / "metrics.jsonl", start)

    def evaluate(step):
        if task.evaluate is not None:
            values = task.evaluate(state)
            metrics.write(step, values)
            progress.note(f"step {step}: " + ", ".join(f"{name} {value:.4f}" for name, value in values.items()))

    # --- steps
    progress = Progress(task.name, start, total, task.batch_size)
    batches = task.batches(start)
    try:
        with _Termination() as termination:
            if start == 0:
                evaluate(0)
            for step in range(start + 1, total + 1):
                static, rows = next(batches)
                state, values = train_step(state, static, sharding.put_batch(mesh, rows, task.batch_size))
                logged = step % config.train.log_every == 0 or step == total
                progress.advance(values if logged else None)
                if logged:
                    metrics.write(step, values)
                    if int(values["skipped"]) >= config.train.max_skipped:
                        checkpoints.save(state)
                        raise NonFiniteError(
                            f"{int(values['skipped'])} steps in a row up to step {step} were not finite; the state is "
                            f"saved in {checkpoints.directory}. Look at the data of these steps, or begin another run "
                            "with a lower optimizer.lr"
                        )
                last = step == total
                if step % config.train.evaluate_every == 0 or last:
                    evaluate(step)
                if step % config.checkpoint.every == 0 or last or termination.requested:
                    checkpoints.save(state)
                if termination.requested:
                    progress.note(f"SIGTERM: saved step {step} in {checkpoints.directory}; run again to continue")
                    raise SystemExit(0)
    finally:
        progress.close()
        checkpoints.close()
    return state


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
