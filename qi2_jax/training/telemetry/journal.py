"""Everything that the training loop reports: metrics, events, the progress bar, profiles, and signs of life."""

import contextlib
import logging
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any

import jax
from jax.sharding import Mesh

from qi2_jax.runtime import processes, signals
from qi2_jax.training.checkpoints.manager import Checkpoints
from qi2_jax.training.config import TrainingConfig
from qi2_jax.training.mean import Mean
from qi2_jax.training.microbatch import PADDING, USEFUL, Microbatch
from qi2_jax.training.step import TrainState
from qi2_jax.training.telemetry import accounting
from qi2_jax.training.telemetry.accounting import Events, Goodput, Idle, Stopwatch
from qi2_jax.training.telemetry.metrics import Drawing, Metrics, fetch
from qi2_jax.training.telemetry.profiling import Profiler
from qi2_jax.training.telemetry.progress import Progress
from qi2_jax.training.telemetry.watchdog import Watchdog

log = logging.getLogger(__name__)

SLOW = 20  # compilation, saves, validation and drawing may take this many times the watchdog's limit of a step


class Journal(contextlib.ExitStack):
    """The reports of a training run, as a context manager that closes them.

    Args:
      name: label of the progress bar.
      directory: folder of the run.
      state: state from which the run continues.
      config: config of the stage, with `train`, `validation`, `checkpoint` and `profile`.
      mesh: devices of the run.
      peak_flops: see `Task`.
      watchdog: watchdog that is informed of every phase.
    """

    def __init__(
        self,
        name: str,
        directory: pathlib.Path,
        state: TrainState,
        config: TrainingConfig,
        mesh: Mesh,
        peak_flops: float | None,
        watchdog: Watchdog,
    ):
        super().__init__()
        start, total = int(state.step), config.train.steps
        self._config, self._chips, self._writes = config.train, mesh.size, jax.process_index() == 0
        self._peak = peak_flops
        self._metrics = Metrics(directory, start, config.train.sinks, config.as_typed)
        self.callback(self._metrics.close)
        self._events, self._program = Events(directory), accounting.program()
        self._events.write(accounting.START, start, **self._program)
        self._goodput, self._watch = Goodput(directory), Stopwatch()
        self._result: jax.Array | None = None  # an output of the last update
        self._progress = Progress(name, start, total)
        self.callback(self._progress.close)
        self._profiler = self.enter_context(Profiler(directory, config.profile.start, config.profile.steps))
        self._watchdog = watchdog
        self._logged: tuple[int, Mapping[str, float]] = (-1, {})  # step and metrics of the last logged step
        self._evaluated: tuple[int, Mapping[str, float]] = (-1, {})  # step and metrics of the last evaluation
        self._skipped = float(state.skipped_total)
        # The metric by which checkpoints are kept: earlier metrics or the first logged step must have it.
        self._unseen = config.checkpoint.best_metric if config.checkpoint.keep_best else ""
        self._begin_interval()
        parameters = sum(leaf.size for leaf in jax.tree.leaves(state.model))
        axes = " x ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
        self.note(
            f"{name}: step {start:,} of {total:,}, training {parameters:,} parameters on {mesh.size} x "
            f"{mesh.devices.flat[0].device_kind} ({axes}), processes: {jax.process_count()}. Checkpoint every "
            f"{config.checkpoint.every:,} steps, validation every {config.validation.every:,}. {directory}"
        )

    def _begin_interval(self) -> None:
        """Begins the next interval between logged steps."""
        self._values: list[Mapping[str, Any]] = []
        self._batch_metrics: list[Mapping[str, float | Mean]] = []
        self._images, self._slots, self._flops = 0, 0, 0.0

    def restored(
        self,
        step: int,
        seconds: float,
        damaged: list[str],
        changes: list[str],
        metrics: Mapping[str, float],
        *,
        local: bool,
    ) -> None:
        """Reports what a resumed run continues from.

        Args:
          step: step of the restored state.
          seconds: duration of the restore.
          damaged: a line for each checkpoint that was passed over.
          changes: a line for each config key that changed.
          metrics: metrics in the manifest of the checkpoint.
          local: whether the checkpoint is a local one.

        Raises:
          ValueError: if the run never wrote the metric by which checkpoints are kept.
        """
        self._logged = step, metrics
        for line in damaged:
            self._events.write(accounting.DAMAGED, step, message=line)
            self.note(line)
        if changes:
            self.note("this run resumes with a changed config:\n  " + "\n  ".join(changes))
        self._events.write(accounting.RESTORE, step, seconds, changes=changes, local=local)
        if self._unseen:  # last, so that a refusal comes after everything is recorded
            self._check_best(self._unseen, processes.gather(" ".join(self._metrics.names()))[0].split())
            self._unseen = ""

    @contextlib.contextmanager
    def phase(self, name: str, step: int, **facts: Any) -> Iterator[None]:
        """A block that is not a step: compile, save, evaluate or sample. `facts` are recorded with the event."""
        limit = SLOW * self._config.watchdog_seconds
        with (
            self._watchdog.phase(f"{name} at step {step}", limit),
            self._watch.measure(name),
            self._events.measure(name, step, **facts),
        ):
            yield

    @contextlib.contextmanager
    def closing(self, checkpoints: Checkpoints) -> Iterator[None]:
        """A block after which the checkpoints are closed while the watchdog runs, so a failed save is reported."""
        try:
            yield
        finally:
            with self._watchdog.phase("the end of the last save", SLOW * self._config.watchdog_seconds):
                checkpoints.close()

    @contextlib.contextmanager
    def step(self, step: int) -> Iterator[None]:
        """A block that takes a step. If it raises, the microbatches of the step are not counted."""
        before = self._images, self._slots, self._flops, list(self._batch_metrics)
        self._watchdog.beat(f"step {step}")
        try:
            with self._profiler.step(step):
                yield
        except BaseException:
            self._images, self._slots, self._flops, self._batch_metrics = before
            raise

    def dispatched(self, result: jax.Array) -> None:
        """Records an output of an update that is not donated. The devices are busy until it is ready."""
        self._result = result

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """A block that reads data. Only the time in which the devices have nothing to compute counts as data time."""
        with Idle(self._result) as idle, self._watch.measure("data", lambda: idle.since):
            yield

    def count(self, microbatch: Microbatch) -> None:
        """Counts a microbatch of the step in progress."""
        stats = microbatch.stats
        self._images += stats.images
        self._slots += stats.slots
        self._flops += stats.flops
        self._batch_metrics.append(stats.metrics)
        self._progress.samples(stats.images)

    def advance(self, values: Mapping[str, Any]) -> None:
        """Counts a step with its metrics, which the devices may still be computing."""
        self._values.append(values)
        self._progress.advance()

    @property
    def pending(self) -> bool:
        """Whether there are steps that are not logged yet."""
        return bool(self._values)

    def logged(self, step: int, learning_rate: float) -> int:
        """Waits for the metrics of the steps since the last logged one and writes their means.

        Args:
          step: step to log.
          learning_rate: rate of its update.

        Returns:
          The largest number of consecutive updates, up to any step of the interval, that were not finite.

        Raises:
          ValueError: at the first logged step of a run, if neither it nor the evaluation before it has the metric by
            which checkpoints are kept.
        """
        values = fetch(self._values) | processes.mean(fetch(self._batch_metrics)) | {"learning_rate": learning_rate}
        lap = self._watch.lap()
        seconds, flops = lap["time/seconds"], self._flops or None
        shares = {"padding": values.get(PADDING, 0.0), "useful": values.get(USEFUL, 1.0)}
        values |= accounting.throughput(self._images, self._slots, flops, seconds, self._chips, self._peak, **shares)
        values |= {**lap, **self._goodput.add(lap), **accounting.device_memory()}
        if values["skipped_total"] > self._skipped:
            self._events.write(accounting.SKIPPED, step, total=int(values["skipped_total"]))
            self.note(f"step {step}: {int(values['skipped_total'])} updates so far were not finite and were skipped")
        self._skipped = values["skipped_total"]
        streak = int(values.pop("skipped"))
        self._metrics.write(step, values)
        self._logged = step, values
        self._progress.show(step, values["loss"])
        if self._unseen:
            self._check_best(self._unseen, values.keys() | self._evaluated[1].keys())
        self._unseen = ""
        self._begin_interval()
        return streak

    @staticmethod
    def _check_best(metric: str, known: Iterable[str]) -> None:
        """Raises a ValueError if the best metric is not among the known ones, unless none is known yet."""
        if known and metric not in known:
            raise ValueError(
                f"checkpoint.best_metric is {metric!r}, which this run does not write: keep_best would keep nothing. "
                f"Choose one of {sorted(known)}, or set checkpoint.keep_best=0"
            )

    def already_done(self, step: int) -> list[str]:
        """Which of "evaluate" and "sample" an earlier start of the run did at a step; the same in all processes."""
        return processes.gather(" ".join(self._metrics.already_done(step)))[0].split()

    def evaluated(self, step: int, values: Mapping[str, float]) -> None:
        """Writes the metrics of an evaluation."""
        self._metrics.write(step, values)
        self._evaluated = step, values
        self.note(f"step {step}: " + ", ".join(f"{name} {x:.4f}" for name, x in values.items() if "/" not in name))

    def committed(self, step: int) -> None:
        """Records that a checkpoint is complete. Called from the thread that saves."""
        with contextlib.suppress(OSError):  # the checkpoint is complete anyway
            self._events.write(accounting.COMMIT, step)

    def drawn(self, step: int, drawings: Mapping[str, Drawing]) -> None:
        """Writes drawings, by name."""
        self._metrics.write_drawings(step, drawings)

    def manifest(self, step: int) -> dict[str, Any]:
        """The manifest of a checkpoint, without the config. It has only metrics of exactly this step."""
        metrics = {
            name: x for at, values in (self._logged, self._evaluated) if at == step for name, x in values.items()
        }
        return {"program": self._program, "data": {"next_step": step + 1}, "metrics": metrics}

    def note(self, text: str) -> None:
        """Prints a line above the progress bar, in process 0."""
        if self._writes:
            self._progress.note(text)

    def stopped(self, step: int, directory: pathlib.Path) -> None:
        """Reports that a signal ended the run after a step, which is saved unless it is 0."""
        name = signals.name() or "SIGTERM"
        self._events.write(accounting.SIGTERM, step, signal=name)
        self.note(f"{name}: {f'saved step {step} in {directory}' if step else 'stopped'}; run again to continue")

    def ended(self, step: int) -> None:
        """Records that the last step is done."""
        self._events.write(accounting.END, step)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        if error is not None and not isinstance(error, SystemExit):
            with contextlib.suppress(OSError):  # such as a full disk; the error itself matters more
                self._events.write(accounting.ERROR, message=f"{type(error).__name__}: {error}"[:2000])
        try:
            return super().__exit__(kind, error, trace)
        except Exception as closing:
            if error is None:
                raise
            log.warning("while closing: %s", closing)
            return False
