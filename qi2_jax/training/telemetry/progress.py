"""The progress bar of a training run."""

import logging
import sys
import time

import jax
from tqdm import tqdm

_log = logging.getLogger(__name__)


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
        self._samples, self._begun = 0, 0.0

    def samples(self, count: int) -> None:
        """Counts samples of the step in progress."""
        self._begun = self._begun or time.monotonic()  # after compilation
        self._samples += count

    def advance(self) -> None:
        """Counts one step."""
        self._bar.update()

    def show(self, step: int, loss: float) -> None:
        """Shows the loss of the last logged interval, and the throughput since the start."""
        seconds = time.monotonic() - self._begun
        line = f"loss {loss:.4f}, {self._samples / seconds:.1f} samples/s"
        self._bar.set_postfix_str(line)
        if self._lines:
            each = seconds / (step - self._start)
            left = tqdm.format_interval(each * (self._total - step))
            _log.info(
                "%s %s/%s: %s, %.3g s/step, %s left", self._name, f"{step:,}", f"{self._total:,}", line, each, left
            )

    def note(self, text: str) -> None:
        """Prints a line above the bar."""
        self._bar.write(text)

    def close(self) -> None:
        self._bar.close()
