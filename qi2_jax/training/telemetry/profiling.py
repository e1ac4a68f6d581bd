"""Traces of a few steps for TensorBoard's profiler and Perfetto, at a step from the config or on SIGUSR1.

Operations have the names of the source, such as `mmdit/block/attention`; see the named scopes in `qi2_jax/models`.
"""

import contextlib
import pathlib
import signal
import threading
from collections.abc import Iterator

import jax

DIRECTORY = "profile"


def check_window(start: int, steps: int) -> None:
    """Raises a ValueError if the first step is below 0 or the window has no step."""
    if start < 0 or steps < 1:
        raise ValueError(
            f"profile.start is {start} and must be at least 0; profile.steps is {steps} and must be at least 1"
        )


class Profiler:
    """Traces steps into `RUN/profile/FIRST_STEP`. Every process traces its own devices.

    Until `close`, SIGUSR1 starts a trace of the next `steps` steps. This needs a profiler that was created in the main
    thread.

    Args:
      directory: folder of the run.
      start: first step of the window in the config; 0: none.
      steps: number of steps in a trace.

    Raises:
      ValueError: as `check_window`.
    """

    def __init__(self, directory: pathlib.Path, start: int = 0, steps: int = 3):
        check_window(start, steps)
        self._directory, self._start, self._steps = directory, start, steps
        self._left = 0  # steps that are still to be traced
        self._asked = False
        self._main = threading.current_thread() is threading.main_thread()
        if self._main:
            self._previous = signal.signal(signal.SIGUSR1, self._ask)

    @contextlib.contextmanager
    def step(self, step: int) -> Iterator[None]:
        """A block that takes a step. It costs nothing while there is no trace."""
        if not self._left and (step == self._start or self._asked):
            self._asked = False
            jax.profiler.start_trace(str(self._directory / DIRECTORY / str(step)))
            self._left = self._steps
        if not self._left:
            yield
            return
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            yield
        self._left -= 1
        if not self._left:
            self._stop()

    def close(self) -> None:
        """Ends a trace in progress and restores the previous handler of SIGUSR1."""
        if self._left:
            self._left = 0
            self._stop()
        if self._main:
            signal.signal(signal.SIGUSR1, self._previous)
            self._main = False

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _ask(self, signum: int, frame: object) -> None:
        self._asked = True

    def _stop(self) -> None:
        # Devices lag behind the host: without waiting, the end of the last step would be missing.
        jax.block_until_ready([array for array in jax.live_arrays() if not array.is_deleted()])
        jax.profiler.stop_trace()
