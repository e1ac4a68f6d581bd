"""The training loop: start or resume, step, evaluate, save; the same for every task."""

import dataclasses
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import jax
import optax
from jax.sharding import Mesh

from qi2_jax.config import recorded
from qi2_jax.config.changes import Change, is_changeable
from qi2_jax.runtime import lock, processes, signals
from qi2_jax.runtime.in_flight import InFlight
from qi2_jax.training import step as steps
from qi2_jax.training.checkpoints import checksums, manager
from qi2_jax.training.checkpoints.manager import Checkpoints
from qi2_jax.training.compiled import Compiled, Part
from qi2_jax.training.config import TrainingConfig
from qi2_jax.training.reader import Feed as Feed
from qi2_jax.training.reader import Reader, put
from qi2_jax.training.reader import Update as Update
from qi2_jax.training.stopping import LastStep
from qi2_jax.training.telemetry import accounting, metrics
from qi2_jax.training.telemetry.journal import SLOW, Journal
from qi2_jax.training.telemetry.watchdog import Watchdog


@dataclasses.dataclass(frozen=True)
class Task:
    """What is trained on what.

    Attributes:
      name: shown in front of the progress bar.
      make_model: builds what is trained from a random key.
      loss: see `step.Loss`.
      updates: what the steps after the given one read, without end.
      examples: one batch of every kind that updates are made of.
      accumulate: whether an update may have several batches.
      data: what the batches come from, as plain JSON; a run continues on the same data only.
      frozen: what the loss reads and training does not change.
      start: puts the weights with which a new run starts into its state.
      accepted: brings what stands beside the run to its config, which is known to fit and is recorded next; called in
        one of several processes.
      evaluate: scalars of a state, before the first step, after the last and every `validation.every`. Calls its second
        argument now and then, which raises where SIGTERM came.
      draw: drawings of a state by name, likewise every `samples.every`, and likewise.
      ema_ramp: whether the average ramps up, see `step.make_programs`.
      peak_flops: of one device, where known: utilisation is stated of it.
    """

    name: str
    make_model: Callable[[jax.Array], Any]
    loss: steps.Loss
    updates: Callable[[int], Iterator[Update]]
    examples: Callable[[], Sequence[Feed]]
    data: dict[str, Any]
    accumulate: bool = False
    frozen: Any = None
    start: Callable[[steps.TrainState], steps.TrainState] = lambda state: state
    accepted: Callable[[], None] = lambda: None
    evaluate: Callable[[steps.TrainState, Callable[[], None]], dict[str, Any]] | None = None
    draw: Callable[[steps.TrainState, Callable[[], None]], dict[str, metrics.Drawing]] | None = None
    ema_ramp: bool = False
    peak_flops: float | None = None


class _Interrupted(Exception):
    """SIGTERM cut an update, an evaluation or pictures short."""


def _unless_terminating() -> None:
    if processes.terminating():
        raise _Interrupted


class NonFiniteError(FloatingPointError):
    """Too many steps in a row had a loss or gradient that is not finite."""


def train(
    task: Task, config: TrainingConfig, directory: pathlib.Path, mesh: Mesh, *, accept_changes: bool = False
) -> steps.TrainState:
    """Trains to `config.train.steps`, continuing from the newest whole checkpoint in `directory` if there is one.

    The directory receives `config.json`, `metrics.jsonl`, `events.jsonl`, `checkpoints/`, and what the sinks write.
    SIGTERM saves and exits with status 0; the same call continues later, also after a kill at any moment.

    Args:
      task: what to train.
      config: of the run, as far as the loop reads it.
      directory: the run.
      mesh: devices of this and the other processes.
      accept_changes: continue although the config is another one, and record what changed.

    Returns:
      The state after the last step.

    Raises:
      ValueError: if the directory belongs to another config or other data, another process trains in it, or its
        checkpoint does not fit the model.
      NonFiniteError: at the first logged step after `train.max_skipped` steps in a row that were not finite; the state
        is saved first.
    """
    optimizer = steps.make_optimizer(config.optimizer)
    # Nothing is broken off here: SIGTERM within Orbax would look like a damaged checkpoint.
    with signals.deferred(), lock.hold(directory), Watchdog(config.train.watchdog_seconds, directory) as watchdog:
        watchdog.beat("the start", SLOW * config.train.watchdog_seconds)
        return _train(task, config, directory, mesh, optimizer, accept_changes, watchdog)


def _asked(config: TrainingConfig, data: dict[str, Any]) -> dict[str, Any]:
    """What a run is recorded to be made with."""
    return {**config.as_typed, "data": data}


def _claim(
    config: TrainingConfig, data: dict[str, Any], directory: pathlib.Path, *, free: bool = False, write: bool = False
) -> list[Change]:
    """`recorded.claim` of a run; every key may change where it is `free`, as before there is a checkpoint."""
    return recorded.claim(
        directory / "config.json",
        _asked(config, data),
        lambda key: free or is_changeable(type(config), key),
        write=write,
        hint=recorded.ACCEPT_HINT,
    )


def is_finished(config: TrainingConfig, data: dict[str, Any], directory: pathlib.Path) -> bool:
    """Whether `train` would have nothing to do in a run: it is at its end, with its last checkpoint whole and nothing
    left to mend or to tell. No array is restored. Every process must ask.

    Args:
      config, data, directory: see `train`; `data` is that of the task.

    Raises:
      ValueError: if the directory belongs to another config or other data.
    """
    total, folder = config.train.steps, directory / "checkpoints"
    with processes.agreed():
        found = max(manager.steps(folder), default=-1) == total and checksums.is_verified(folder / str(total))
    if not processes.all_say(found):
        return False
    with processes.agreed():
        _claim(config, data, directory)
        wrong = checksums.problems(folder / str(total), jax.process_index(), jax.process_count())
    if not processes.all_say(not wrong):  # before anything is read: another process may have compared that
        return False
    with processes.agreed():
        skipped = int(manager.weights(folder / str(total), "progress")["skipped"].read())
        ended = accounting.has_ended(directory, total)
    finished = processes.all_say(ended and skipped < config.train.max_skipped)
    if finished:
        processes.say(f"{directory} is finished: its last checkpoint, of step {total:,}, is whole")
    return finished


class _Run:
    """What a run does beside its steps: look at the state, log, save, and tell how it ends."""

    def __init__(
        self,
        task: Task,
        config: TrainingConfig,
        state: steps.TrainState,
        checkpoints: Checkpoints,
        journal: Journal,
    ):
        self._task, self._config = task, config
        self.state, self._checkpoints, self._journal = state, checkpoints, journal
        self._rate = steps.learning_rate(config.optimizer)

    def look(self, step: int, looked: Sequence[str] = ()) -> bool:
        """Evaluates and draws where that is due and not done yet; False where SIGTERM came and cut it short."""
        task, journal, end = self._task, self._journal, self._config.train.steps
        due = [
            name
            for name, every in (("evaluate", self._config.validation.every), ("sample", self._config.samples.every))
            if name not in looked and (step in (0, end) or (every and step % every == 0))
        ]
        try:
            if task.evaluate is not None and "evaluate" in due:
                with journal.phase("evaluate", step):
                    journal.evaluated(step, task.evaluate(self.state, _unless_terminating))
            if task.draw is not None and "sample" in due:
                with journal.phase("sample", step):
                    journal.drawn(step, task.draw(self.state, _unless_terminating))
        except _Interrupted:
            return False
        return True

    def log(self, step: int) -> None:
        """Writes the metrics since the last logged step; ends a run that is lost."""
        streak = self._journal.logged(step, float(self._rate(step - 1 - int(self.state.skipped_total))))
        if streak >= self._config.train.max_skipped:
            self.save(wait=True)
            raise NonFiniteError(_lost(self.state, streak, self._checkpoints.directory))

    def log_rest(self, step: int) -> None:
        """The same where steps were taken since."""
        if self._journal.pending:
            self.log(step)

    def save(self, *, wait: bool = False, locally: bool = False) -> None:
        """Saves the state; a step that is saved for good already is not saved again."""
        step = int(self.state.step)
        with self._journal.phase("save", step, local=locally):
            put_away = self._checkpoints.save_locally if locally else self._checkpoints.save
            asked = _asked(self._config, self._task.data)
            put_away(self.state, {"config": asked, **self._journal.manifest(step)})
            if wait:  # what is told after it must be true
                self._checkpoints.wait()

    def stop(self) -> NoReturn:
        """Ends the process after SIGTERM, with the state saved."""
        step = int(self.state.step)
        if step:
            self.save(wait=True)
        self._journal.stopped(step, self._checkpoints.directory)
        raise signals.Terminated(told=True)

    def end(self) -> steps.TrainState:
        """Ends the run: its state, which is saved."""
        self._checkpoints.end_locally()
        processes.gather("")  # nothing is left by others when this is on record
        self._journal.ended(int(self.state.step))
        return self.state


def _train(
    task: Task,
    config: TrainingConfig,
    directory: pathlib.Path,
    mesh: Mesh,
    optimizer: optax.GradientTransformation,
    accept_changes: bool,
    watchdog: Watchdog,
) -> steps.TrainState:
    # --- where we are: nothing is written before everything is known to fit
    checkpoints = Checkpoints(directory / "checkpoints", config.checkpoint)
    begun = checkpoints.latest() is not None
    free = accept_changes or not begun
    changes = _claim(config, task.data, directory, free=free)

    # --- state: resumed or fresh
    restoring = time.monotonic()
    restored = checkpoints.restore(steps.abstract_state(task.make_model, optimizer, mesh)) if begun else None
    restoring = time.monotonic() - restoring
    if restored is None:
        state = task.start(steps.init_state(task.make_model, optimizer, jax.random.key(config.seed), mesh))
    else:
        state = restored[0]
    with processes.agreed(interruptible=False):
        if jax.process_index() == 0:
            task.accepted()
        _claim(config, task.data, directory, free=free, write=jax.process_index() == 0)
    checkpoints.begin_locally()
    start, total = int(state.step), config.train.steps
    if start >= total and _is_lost(state, config):
        checkpoints.close()
        raise NonFiniteError(_lost(state, int(state.skipped), checkpoints.directory))

    with (
        Journal(task.name, directory, state, config, mesh, task.peak_flops, watchdog) as journal,
        journal.closing(checkpoints),
    ):
        if restored is not None:
            local = start != checkpoints.latest()
            known = restored[1].get("metrics", {})
            journal.restored(start, restoring, checkpoints.damaged, list(map(str, changes)), known, local=local)

        # --- what a new run begins with, or SIGTERM kept an earlier process from
        run = _Run(task, config, state, checkpoints, journal)
        del state, restored  # the first update reuses their memory
        if processes.terminating() or not run.look(start, journal.looked(start)):
            run.stop()
        if start >= total:
            run.save(wait=True)  # what stands on the hosts' own disks only
            return run.end()

        # --- programs: all of them now, none later
        with journal.phase("compile", start):
            programs = steps.make_programs(
                task.loss, optimizer, config.ema_decay, config.seed, mesh, ema_ramp=task.ema_ramp
            )
            with processes.agreed():
                examples = [Part(feed.static, put(mesh, feed)) for feed in task.examples()]
            update = Compiled(programs, run.state, task.frozen, examples, task.accumulate, mesh)
            del examples
            processes.gather("")  # Gloo waits 30 seconds for those that still compile, not longer

        # --- steps: all processes take the same, and know the last one when they come to it
        running, lag = InFlight(config.train.ahead), config.train.ahead if jax.process_count() > 1 else 0
        reader = Reader(task.updates(start), start, total, mesh, journal.reading, journal.fed)
        last = LastStep(mesh, lag)
        # Long updates end between two parts; short ones are not worth asking all processes before each.
        before_each = (lambda: None) if config.train.ahead else _unless_terminating
        step, end = start, last.known(start if signals.received() else reader.reach(start + 1 + lag), wait=True)
        while step < min(total, end):
            step += 1
            try:
                with journal.step(step):
                    run.state, values = update(run.state, task.frozen, reader.parts(), before_each)
                    journal.dispatched(values["loss"])
                    possible = reader.reach(step + 1 + lag)  # while the devices compute
                    running.add(values["loss"])
            except _Interrupted:  # the state is that of the step before
                run.log_rest(step - 1)
                run.stop()
            journal.advance(values)
            end = last.known(min(step + lag, possible) if signals.received() else possible)
            saved = step % config.checkpoint.every == 0 or step >= min(total, end)
            locally = not saved and checkpoints.local is not None and step % config.checkpoint.local_every == 0
            # Before a save too: a run that goes on from there then averages over the same steps.
            if step % config.train.log_every == 0 or saved or locally:
                run.log(step)
            if not run.look(step):  # what is left out is done when the run goes on
                run.log_rest(step)
                run.stop()
            if saved or locally:
                run.save(wait=step >= min(total, end), locally=not saved)
        if end <= step:
            with processes.agreed(interruptible=False):
                reader.check()
            run.stop()
        return run.end()


def _is_lost(state: steps.TrainState, config: TrainingConfig) -> bool:
    return int(state.skipped) >= config.train.max_skipped


def _lost(state: steps.TrainState, streak: int, directory: pathlib.Path) -> str:
    where = "up to" if streak == int(state.skipped) else "before"
    return (
        f"{streak} steps in a row {where} step {int(state.step)} were not finite; the state is saved in "
        f"{directory}. Look at the data of these steps, or begin another run with a lower optimizer.lr"
    )
