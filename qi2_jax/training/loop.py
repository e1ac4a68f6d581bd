"""The training loop, the same for every task: start or resume, then step, evaluate and save."""

import pathlib
import time
from collections.abc import Mapping
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from qi2_jax.config import recorded
from qi2_jax.config.changes import Change, is_changeable
from qi2_jax.runtime import lock, processes, signals
from qi2_jax.runtime.in_flight import InFlight
from qi2_jax.training import microbatch, restarting
from qi2_jax.training.checkpoints import checksums, contents, files
from qi2_jax.training.checkpoints.manager import Checkpoints
from qi2_jax.training.compiled import Compiled
from qi2_jax.training.config import TrainingConfig
from qi2_jax.training.reader import Reader
from qi2_jax.training.run import NonFiniteError, Run, non_finite_message, raise_if_interrupted, too_many_skipped
from qi2_jax.training.saving import Save, SaveSchedule
from qi2_jax.training.step import TrainState, abstract_state, init_state, make_optimizer, make_programs
from qi2_jax.training.stopping import Stopping
from qi2_jax.training.task import Task
from qi2_jax.training.telemetry import accounting
from qi2_jax.training.telemetry.journal import SLOW, Journal
from qi2_jax.training.telemetry.watchdog import Watchdog


def train(
    task: Task,
    config: TrainingConfig,
    directory: pathlib.Path,
    mesh: Mesh,
    *,
    accept_changes: bool = False,
    restart: bool = False,
) -> TrainState:
    """Trains to `config.train.steps`, continuing from the newest intact checkpoint in `directory` if there is one.

    The directory receives `config.json`, `metrics.jsonl`, `events.jsonl`, `checkpoints/`, and what the sinks write.
    SIGTERM, SIGINT (Ctrl-C) and SIGHUP save the state and end the process. The same call resumes the run later, also
    after a kill at any moment.

    Args:
      task: model, data and loss.
      config: config of the run.
      directory: folder of the run.
      mesh: devices of all processes.
      accept_changes: whether to resume even if the config changed since the run started; the changes are recorded.
      restart: whether to start over from step 0 if the checkpoints of an earlier run are gone, see `restarting.check`.

    Returns:
      The state after the last step.

    Raises:
      ValueError: if the directory was created with another config or other data, another process trains in it, its
        checkpoints do not fit the model, or they are gone.
      NonFiniteError: at the first logged step after `train.max_skipped` steps in a row that were not finite. The state
        is saved first.
    """
    optimizer = make_optimizer(config.optimizer)
    # Signals are deferred: an exception within Orbax would look like a damaged checkpoint.
    with signals.deferred(), lock.hold(directory), Watchdog(config.train.watchdog_seconds, directory) as watchdog:
        watchdog.beat("the start", SLOW * config.train.watchdog_seconds)
        restarting.check(directory, restart=restart)
        return _train(task, config, directory, mesh, optimizer, accept_changes, watchdog)


def _record(config: TrainingConfig, data: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a run as it is recorded."""
    return {**config.as_typed, "data": dict(data)}


def _claim(
    config: TrainingConfig,
    data: Mapping[str, Any],
    directory: pathlib.Path,
    *,
    allow_all: bool = False,
    write: bool = False,
) -> list[Change]:
    """Checks the config against `config.json`; if `allow_all`, any key may differ. With `write`, it is recorded."""
    return recorded.claim(
        directory / "config.json",
        _record(config, data),
        lambda key: allow_all or is_changeable(type(config), key),
        cls=type(config),
        write=write,
        hint=recorded.ACCEPT_HINT,
    )


def is_finished(config: TrainingConfig, data: Mapping[str, Any], directory: pathlib.Path) -> bool:
    """Whether `train` would have nothing to do: the run is at its end, and its last checkpoint is intact.

    No array is restored. Every process must call it.

    Args:
      config: as for `train`.
      data: `data` of the task.
      directory: as for `train`.

    Raises:
      ValueError: if the directory was created with another config or other data.
    """
    total, folder = config.train.steps, directory / "checkpoints"
    with processes.raise_together():
        found = max(files.steps(folder), default=-1) == total and checksums.is_verified(folder / str(total))
    if not processes.all_true(found):
        return False
    with processes.raise_together():
        _claim(config, data, directory)
        wrong = checksums.problems(folder / str(total), jax.process_index(), jax.process_count())
    if not processes.all_true(not wrong):  # before anything is read, since another process may have found the damage
        return False
    with processes.raise_together():
        skipped = int(contents.weights(folder / str(total), "progress")["skipped"].read())
        ended = accounting.has_ended(directory, total)
    finished = processes.all_true(ended and skipped < config.train.max_skipped)
    if finished:
        processes.log_on_main(f"{directory} is finished; its last checkpoint, step {total:,}, is intact")
    return finished


def _train(
    task: Task,
    config: TrainingConfig,
    directory: pathlib.Path,
    mesh: Mesh,
    optimizer: optax.GradientTransformation,
    accept_changes: bool,
    watchdog: Watchdog,
) -> TrainState:
    # --- Compare with earlier starts. Nothing is written before everything is known to fit.
    checkpoints = Checkpoints(directory / "checkpoints", config.checkpoint)
    begun = checkpoints.latest() is not None
    allow_all = accept_changes or not begun
    changes = _claim(config, task.data, directory, allow_all=allow_all)

    # --- State: restored or fresh.
    began = time.monotonic()
    restored = checkpoints.restore(abstract_state(task.make_model, optimizer, mesh)) if begun else None
    seconds = time.monotonic() - began
    if restored is None:
        state = task.initial_state(init_state(task.make_model, optimizer, jax.random.key(config.seed), mesh))
    else:
        state = restored[0]
    with processes.raise_together(interruptible=False):
        if jax.process_index() == 0:
            task.on_config_accepted()
        _claim(config, task.data, directory, allow_all=allow_all, write=jax.process_index() == 0)
    checkpoints.begin_locally()
    start, total = int(state.step), config.train.steps
    if start >= total and too_many_skipped(state, config):
        checkpoints.close()
        raise NonFiniteError(non_finite_message(state, int(state.skipped), checkpoints.directory))

    with (
        Journal(task.name, directory, state, config, mesh, task.peak_flops, watchdog) as journal,
        journal.closing(checkpoints),
    ):
        checkpoints.on_commit = journal.committed
        if restored is not None:
            local = start != checkpoints.latest()
            known = restored[1].get("metrics", {})
            journal.restored(start, seconds, checkpoints.damaged, list(map(str, changes)), known, local=local)
        record = _record(config, task.data)
        run = Run(task=task, config=config, record=record, state=state, checkpoints=checkpoints, journal=journal)
        del state, restored  # the first update reuses their memory
        with run.stopped_by_signals():
            raise_if_interrupted()
            run.evaluate_and_sample(start, journal.already_done(start))
            if start < total:
                _take_steps(run, task, config, optimizer, mesh, checkpoints, journal)
            else:
                run.save(Save.PERSISTENT, wait=True)  # it may only be in local checkpoints
        return run.end()


def _take_steps(
    run: Run,
    task: Task,
    config: TrainingConfig,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    checkpoints: Checkpoints,
    journal: Journal,
) -> None:
    start, total, ahead = int(run.state.step), config.train.steps, config.train.ahead
    with journal.phase("compile", start):
        update = _compile(task, config, optimizer, mesh, run.state)
    reader = Reader(task.updates(start), start, total, mesh, journal.reading, journal.count)
    stopping = Stopping(mesh, reader, start, total, ahead)
    saves = SaveSchedule(config.checkpoint.every, config.checkpoint.local_every if checkpoints.local else 0)
    in_flight = InFlight(ahead)
    # Long updates may end between two microbatches. For short ones, asking all processes each time would cost too much.
    check_signals = (lambda: None) if ahead else raise_if_interrupted

    step, follows = start, stopping.should_continue(start)
    while follows:
        step += 1
        with journal.step(step), jax.transfer_guard("disallow"):
            run.state, values = update(run.state, task.frozen, reader.microbatches(), check_signals)
            journal.dispatched(values["loss"])
            reader.read_to(step + 1 + stopping.lag)  # while the devices compute
            in_flight.add(values["loss"])
        journal.advance(values)
        follows = stopping.should_continue(step)
        save = saves.due(step, last=not follows)
        # Logged before every save, so that a run that resumes there averages over the same steps.
        if save or step % config.train.log_every == 0:
            run.log(step)
        run.evaluate_and_sample(step)
        if save:
            run.save(save, wait=not follows)
    if stopping.is_early(step):
        with processes.raise_together(interruptible=False):
            reader.raise_error()
        run.stop()


def _compile(
    task: Task, config: TrainingConfig, optimizer: optax.GradientTransformation, mesh: Mesh, state: TrainState
) -> Compiled:
    """Compiles all programs of the run."""
    programs = make_programs(
        task.loss,
        optimizer,
        config.ema_decay,
        config.seed,
        mesh,
        ema_ramp=task.ema_ramp,
        trained=task.trained,
        prepare=task.prepare,
        replicas=task.replicas,
        sum_dtype=task.sum_dtype,
    )
    with processes.raise_together():
        examples = [microbatch.put(mesh, example) for example in task.examples()]
    update = Compiled(programs, state, task.frozen, examples, task.accumulate, mesh, task.replicas)
    processes.gather("")  # Gloo waits no longer than 30 seconds for processes that still compile
    return update
