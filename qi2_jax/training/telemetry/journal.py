"""What the loop tells: metrics at logged steps, events, the progress bar, and what watches over a step that hangs."""

import contextlib
import pathlib
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from qi2_jax.runtime import processes
from qi2_jax.training.checkpoints.manager import Checkpoints
from qi2_jax.training.config import TrainingConfig
from qi2_jax.training.mean import Mean
from qi2_jax.training.microbatch import Microbatch
from qi2_jax.training.step import TrainState
from qi2_jax.training.telemetry import accounting
from qi2_jax.training.telemetry.accounting import Events, Goodput, Idle, Stopwatch
from qi2_jax.training.telemetry.metrics import Drawing, Metrics, fetch
from qi2_jax.training.telemetry.profiling import Profiler
from qi2_jax.training.telemetry.progress import Progress
from qi2_jax.training.telemetry.watchdog import Watchdog

SLOW = 20  # times the watchdog's limit of a step is what compilation, saves, validation and pictures may take


class Journal(contextlib.ExitStack):
    """Everything that a training reports; close it by leaving its block.

    Args:
      name: shown in front of the progress bar.
      directory: the run.
      state: from which it continues.
      config: of the run.
      mesh: the devices.
      peak_flops: see `loop.Task`.
      watchdog: is told what goes on.
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
        self._result: jax.Array | None = None  # of the last update
        self._progress = Progress(name, start, total)
        self.callback(self._progress.close)
        self._profiler = self.enter_context(Profiler(directory, config.profile.start, config.profile.steps))
        self._watchdog = watchdog
        self._logged: tuple[int, Mapping[str, float]] = (-1, {})  # what was logged last and its step
        self._evaluated: tuple[int, Mapping[str, float]] = (-1, {})  # the last evaluation and its step
        self._skipped = float(state.skipped_total)
        # By which checkpoints are kept: known from before, or the first logged step must know it.
        self._unseen = config.checkpoint.best_metric if config.checkpoint.keep_best else ""
        self._forget()
        parameters = sum(leaf.size for leaf in jax.tree.leaves(state.model))
        axes = " x ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
        self.note(
            f"{name}: step {start:,} of {total:,}, {parameters:,} parameters are trained on {mesh.size} x "
            f"{mesh.devices.flat[0].device_kind} ({axes}), processes: {jax.process_count()}; saves every "
            f"{config.checkpoint.every:,} steps, validation every {config.validation.every:,}; {directory}"
        )

    def _forget(self) -> None:
        """Begins another interval between logged steps."""
        self._values: list[Mapping[str, Any]] = []
        self._batch_metrics: list[Mapping[str, float | Mean]] = []
        self._images, self._tokens, self._flops = 0, 0, 0.0

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
        """Tells what a continued run begins with; `metrics` are those of its checkpoint.

        Raises:
          ValueError: if nothing ever wrote the metric by which checkpoints are kept.
        """
        self._logged = step, metrics
        for line in damaged:
            self._events.write(accounting.DAMAGED, step, message=line)
            self.note(line)
        if changes:
            self.note("this run goes on with another config:\n  " + "\n  ".join(changes))
        self._events.write(accounting.RESTORE, step, seconds, changes=changes, local=local)
        if self._unseen:  # last: what is on record stays so where this refuses
            self._check_best(self._unseen, processes.gather(" ".join(self._metrics.names()))[0].split())
            self._unseen = ""

    @contextlib.contextmanager
    def phase(self, name: str, step: int, **facts: Any) -> Iterator[None]:
        """Around everything that is no step: compile, save, evaluate or sample; facts are for the events."""
        limit = SLOW * self._config.watchdog_seconds
        with (
            self._watchdog.phase(f"{name} at step {step}", limit),
            self._watch.measure(name),
            self._events.measure(name, step, **facts),
        ):
            yield

    @contextlib.contextmanager
    def closing(self, checkpoints: Checkpoints) -> Iterator[None]:
        """Closes checkpoints after a block, while all is still watched, so that a save that failed is told."""
        try:
            yield
        finally:
            with self._watchdog.phase("the end of the last save", SLOW * self._config.watchdog_seconds):
                checkpoints.close()

    @contextlib.contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Around a step; of one that is not taken, batches do not count."""
        before = self._images, self._tokens, self._flops, list(self._batch_metrics)
        self._watchdog.beat(f"step {step}")
        try:
            with self._profiler.step(step):
                yield
        except BaseException:
            self._images, self._tokens, self._flops, self._batch_metrics = before
            raise

    def dispatched(self, result: jax.Array) -> None:
        """Takes something that an update returns, and nothing donates: until it is ready, the devices are busy."""
        self._result = result

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Around reading of data: what the devices compute meanwhile is the time of a step, the rest that of data."""
        with Idle(self._result) as idle, self._watch.measure("data", lambda: idle.since):
            yield

    def count(self, microbatch: Microbatch) -> None:
        """Counts a microbatch of the step in progress."""
        stats = microbatch.stats
        self._images += stats.images
        self._tokens += stats.tokens
        self._flops += stats.flops
        self._batch_metrics.append(stats.metrics)
        self._progress.samples(stats.images)

    def advance(self, values: Mapping[str, Any]) -> None:
        """Counts a step with its metrics, which may still be computed."""
        self._values.append(values)
        self._progress.advance()

    @property
    def pending(self) -> bool:
        """Whether steps were counted that are not logged yet."""
        return bool(self._values)

    def logged(self, step: int, learning_rate: float) -> int:
        """Waits for the metrics since the last logged step and writes them, as means over the interval.

        Returns:
          The longest run of updates in a row, up to any step of the interval, that were not finite.

        Raises:
          ValueError: at the first logged step of a run, if neither it nor the evaluation before it has the metric by
            which checkpoints are kept.
        """
        values = fetch(self._values) | processes.mean(fetch(self._batch_metrics)) | {"learning_rate": learning_rate}
        lap = self._watch.lap()
        seconds, flops = lap["time/seconds"], self._flops or None
        values |= accounting.throughput(self._images, self._tokens, flops, seconds, self._chips, self._peak)
        values |= {**lap, **self._goodput.add(lap), **accounting.device_memory()}
        if values["skipped_total"] > self._skipped:
            self._events.write(accounting.SKIPPED, step, total=int(values["skipped_total"]))
            self.note(f"step {step}: {int(values['skipped_total'])} updates so far were not finite and were left out")
        self._skipped = values["skipped_total"]
        streak = int(values.pop("skipped"))
        self._metrics.write(step, values)
        self._logged = step, values
        self._progress.show(step, values["loss"])
        if self._unseen:
            self._check_best(self._unseen, values.keys() | self._evaluated[1].keys())
        self._unseen = ""
        self._forget()
        return streak

    @staticmethod
    def _check_best(metric: str, known: Iterable[str]) -> None:
        """Refuses a metric that nothing writes, by which checkpoints would be kept; not where nothing is known yet."""
        if known and metric not in known:
            raise ValueError(
                f"checkpoint.best_metric is {metric!r}, which this run does not write: keep_best would keep nothing. "
                f"Choose one of {sorted(known)}, or set checkpoint.keep_best=0"
            )

    def already_done(self, step: int) -> list[str]:
        """Which of "evaluate" and "sample" an earlier start of the run did at a step; the same in all processes."""
        return processes.gather(" ".join(self._metrics.already_done(step)))[0].split()

    def evaluated(self, step: int, values: Mapping[str, float]) -> None:
        """Writes the scalars of an evaluation."""
        self._metrics.write(step, values)
        self._evaluated = step, values
        self.note(f"step {step}: " + ", ".join(f"{name} {x:.4f}" for name, x in values.items() if "/" not in name))

    def committed(self, step: int) -> None:
        """Records that a checkpoint is complete. Called from the thread that saves."""
        with contextlib.suppress(OSError):  # the checkpoint is whole all the same
            self._events.write(accounting.COMMIT, step)

    def drawn(self, step: int, drawings: Mapping[str, Drawing]) -> None:
        """Writes drawings, by name."""
        self._metrics.write_drawings(step, drawings)

    def manifest(self, step: int) -> dict[str, Any]:
        """What a checkpoint tells of itself beside the config; of metrics only those of this very step."""
        metrics = {
            name: x for at, values in (self._logged, self._evaluated) if at == step for name, x in values.items()
        }
        return {"program": self._program, "data": {"next_step": step + 1}, "metrics": metrics}

    def note(self, text: str) -> None:
        """Prints above the progress bar, in process 0."""
        if self._writes:
            self._progress.note(text)

    def stopped(self, step: int, directory: pathlib.Path) -> None:
        """Tells that SIGTERM ended the run after a step, which is saved unless it is 0."""
        self._events.write(accounting.SIGTERM, step)
        self.note(f"SIGTERM: {f'saved step {step} in {directory}' if step else 'stopped'}; run again to continue")

    def ended(self, step: int) -> None:
        """Tells that the last step is done."""
        self._events.write(accounting.END, step)

    def __exit__(self, kind, error, trace):
        if error is not None and not isinstance(error, SystemExit):
            with contextlib.suppress(OSError):  # a full disk, say: the error itself matters more
                self._events.write(accounting.ERROR, message=f"{type(error).__name__}: {error}"[:2000])
        try:
            return super().__exit__(kind, error, trace)
        except Exception as closing:
            if error is None:
                raise
            print(f"while closing: {closing}", file=sys.stderr)
            return False
