"""Side effects around the steps of a training run: evaluate, draw, log, save, stop."""

import contextlib
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import jax

from qi2_jax.runtime import processes, signals
from qi2_jax.training.checkpoints.manager import Checkpoints
from qi2_jax.training.config import TrainingConfig
from qi2_jax.training.saving import Save
from qi2_jax.training.step import TrainState, learning_rate
from qi2_jax.training.task import Task
from qi2_jax.training.telemetry.journal import Journal


class Interrupted(Exception):
    """A signal interrupted an update, an evaluation or a drawing."""


class NonFiniteError(FloatingPointError):
    """Too many steps in a row had a loss or gradient that is not finite."""


def raise_if_interrupted() -> None:
    """Raises `Interrupted` if any process received a signal to stop. Every process must call it."""
    with jax.transfer_guard("allow"):  # also within a step, where only `microbatch.put` may copy to the devices
        terminating = processes.terminating()
    if terminating:
        raise Interrupted


class Run:
    """A training run in progress.

    Args:
      task: task that is trained.
      config: config of the stage.
      record: config as checkpoints record it.
      state: training state, which the loop replaces after every step.
      checkpoints: destination of saves.
      journal: destination of metrics and events.
    """

    def __init__(
        self,
        *,
        task: Task,
        config: TrainingConfig,
        record: dict[str, Any],
        state: TrainState,
        checkpoints: Checkpoints,
        journal: Journal,
    ):
        self._task, self._config, self._record = task, config, record
        self.state, self._checkpoints, self._journal = state, checkpoints, journal
        self._rate = learning_rate(config.optimizer)

    def evaluate_and_sample(self, step: int, already_done: Sequence[str] = ()) -> None:
        """Evaluates and draws if due.

        Raises:
          Interrupted: if a signal arrived; the rest is due again when the run resumes.
        """
        task, journal, last = self._task, self._journal, self._config.train.steps

        def is_due(name: str, every: int) -> bool:
            return name not in already_done and (step in (0, last) or (every > 0 and step % every == 0))

        if task.evaluates and is_due("evaluate", self._config.validation.every):
            with journal.phase("evaluate", step):
                journal.evaluated(step, task.evaluate(self.state, raise_if_interrupted))
        if task.draws and is_due("sample", self._config.samples.every):
            with journal.phase("sample", step):
                journal.drawn(step, task.draw(self.state, raise_if_interrupted))

    def log(self, step: int) -> None:
        """Writes the metrics of the steps since the last logged one.

        Raises:
          NonFiniteError: if too many steps in a row were not finite. The state is saved first.
        """
        streak = self._journal.logged(step, float(self._rate(step - 1 - int(self.state.skipped_total))))
        if streak >= self._config.train.max_skipped:
            self.save(Save.PERSISTENT, wait=True)
            raise NonFiniteError(non_finite_message(self.state, streak, self._checkpoints.directory))

    def save(self, kind: Save, *, wait: bool = False) -> None:
        """Saves the state, unless its step is saved persistently already.

        Args:
          kind: persistent or local.
          wait: whether the save must be complete on return.
        """
        step, local = int(self.state.step), kind is Save.LOCAL
        with self._journal.phase("save", step, local=local):
            save = self._checkpoints.save_locally if local else self._checkpoints.save
            save(self.state, {"config": self._record, **self._journal.manifest(step)})
            if wait:
                self._checkpoints.wait()

    @contextlib.contextmanager
    def stopped_by_signals(self) -> Iterator[None]:
        """A block that, if it raises `Interrupted`, saves the state and ends the process."""
        try:
            yield
        except Interrupted:
            if self._journal.pending:
                self.log(int(self.state.step))
            self.stop()

    def stop(self) -> NoReturn:
        """Saves the state and ends the process after a signal."""
        step = int(self.state.step)
        if step:
            self.save(Save.PERSISTENT, wait=True)
        self._journal.stopped(step, self._checkpoints.directory)
        raise signals.Terminated(reported=True)

    def end(self) -> TrainState:
        """Ends a run whose last step is saved, and returns its state."""
        self._checkpoints.end_locally()
        processes.gather("")  # wait until all processes have deleted their local checkpoints; only then record the end
        self._journal.ended(int(self.state.step))
        return self.state


def too_many_skipped(state: TrainState, config: TrainingConfig) -> bool:
    """Whether too many of the latest steps in a row were not finite."""
    return int(state.skipped) >= config.train.max_skipped


def non_finite_message(state: TrainState, streak: int, directory: pathlib.Path) -> str:
    """The message of a run that ends because of `streak` steps that were not finite."""
    where = "up to" if streak == int(state.skipped) else "before"
    return (
        f"{streak} steps in a row {where} step {int(state.step)} were not finite. The state is saved in {directory}. "
        "Check the data of these steps, or start another run with a lower optimizer.lr"
    )
