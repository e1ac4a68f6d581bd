"""Logging: one handler for the program, and a helper that reports slow work.

Libraries log with `logging.getLogger(__name__)`. The command line calls `set_up` once; other programs that use qi2 as a
library set up logging as they like.
"""

import contextlib
import logging
import os
import sys
import time
from collections.abc import Iterator

LEVEL = "QI2_LOG"  # environment variable
LEVELS = ("debug", "info", "warning", "error")
_OURS = ("qi2_jax", "data_pipeline", "qi2_torch", "experiments")

_process = ""  # in front of each line where there are several processes


class _Handler(logging.Handler):
    """Writes to the current `sys.stderr`, above a progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record) + "\n"
            above = getattr(sys.modules.get("tqdm"), "tqdm", None)
            with above.external_write_mode(file=sys.stderr) if above else contextlib.nullcontext():
                sys.stderr.write(line)
                sys.stderr.flush()
        except Exception:
            self.handleError(record)


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        level = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
        message = super().format(record)
        return f"{self.formatTime(record, '%H:%M:%S')} {_process}{level}{message}"


def set_up(level: str | None = None) -> None:
    """Sends the messages of this program to stderr, with the time and, among several processes, the process's number.

    Other libraries report warnings only.

    Args:
      level: one of `LEVELS`; None: the environment's `QI2_LOG`, by default "info".

    Raises:
      ValueError: for another level.
    """
    level = level or os.environ.get(LEVEL) or "info"
    if level.lower() not in LEVELS:
        raise ValueError(f"{LEVEL} is {level!r}; choose one of {', '.join(LEVELS)}")
    root = logging.getLogger()
    for other in [*root.handlers]:  # a library that was imported earlier may have added one, as absl does
        if getattr(other, "stream", None) in (sys.stderr, sys.__stderr__):
            root.removeHandler(other)
    if not any(isinstance(handler, _Handler) for handler in root.handlers):
        handler = _Handler()
        handler.setFormatter(_Formatter())
        root.addHandler(handler)
    for name in _OURS:
        logging.getLogger(name).setLevel(level.upper())


def name_process(index: int, count: int) -> None:
    """Puts the number of this process in front of each message if there are several processes.

    Processes other than 0 then report warnings only, unless the level is "debug": their messages would be the same.
    """
    global _process
    if count > 1:
        _process = f"[{index}] "
        for name in _OURS:
            logger = logging.getLogger(name)
            if index and logger.level == logging.INFO:
                logger.setLevel(logging.WARNING)


def loading(logger: logging.Logger, name: str, parameters: int) -> contextlib.AbstractContextManager[None]:
    """Logs that a component of a model is loaded, with its size and the time.

    Args:
      logger: logger of the module.
      name: name of the component's folder, such as "text_encoder".
      parameters: number of its parameters.
    """
    return timed(logger, f"loading the {name.replace('_', ' ')} ({parameters:,} parameters)")


@contextlib.contextmanager
def timed(logger: logging.Logger, doing: str) -> Iterator[None]:
    """Logs what begins, and at the end how long it took.

    Args:
      logger: logger of the module.
      doing: a present participle with its object, such as "loading the autoencoder".
    """
    logger.info("%s ...", doing)
    begun = time.monotonic()
    yield
    logger.info("%s: %.1f s", doing, time.monotonic() - begun)
