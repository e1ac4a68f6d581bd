"""The progress bar of a training run."""

import collections
import logging
import sys
import time

import jax
from tqdm import tqdm

_log = logging.getLogger(__name__)
RECENT = 10  # logged intervals that throughput and time left are measured over: phases of a run differ in speed


class Progress:
    """Shows steps with loss, images per second and time left: a bar on a terminal, otherwise a line per logged step."""

    def __init__(self, name: str, start: int, total: int):
        self._name, self._start, self._total = name, start, total
        first = jax.process_index() == 0
        self._lines = first and not sys.stderr.isatty()
        self._bar = tqdm(
            total=total,
            initial=start,
            desc=name,
            unit="step",
            dynamic_ncols=True,
            disable=not first or self._lines,
        )
        self._samples = 0
        self._marks: collections.deque[tuple[float, int, int]] = collections.deque(maxlen=RECENT + 1)

    def samples(self, count: int) -> None:
        """Counts samples of the step in progress."""
        if not self._marks:
            self._marks.append((time.monotonic(), self._start, 0))  # after compilation
        self._samples += count

    def advance(self) -> None:
        """Counts one step."""
        self._bar.update()

    def show(self, step: int, loss: float) -> None:
        """Shows the loss of the last logged interval, and the throughput of the last `RECENT` intervals."""
        self._marks.append((time.monotonic(), step, self._samples))
        seconds, steps, samples = (last - first for first, last in zip(self._marks[0], self._marks[-1], strict=True))
        line = f"loss {loss:.4f}, {samples / seconds:.1f} samples/s"
        self._bar.set_postfix_str(line)
        if self._lines:
            each = seconds / steps
            left = tqdm.format_interval(each * (self._total - step))
            _log.info(
                "%s %s/%s: %s, %.3g s/step, %s left", self._name, f"{step:,}", f"{self._total:,}", line, each, left
            )

    def note(self, text: str) -> None:
        """Prints a line above the bar."""
        self._bar.write(text)

    def close(self) -> None:
        self._bar.close()
