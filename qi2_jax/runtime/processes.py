"""Runs several processes as one program: how they join, how they agree, and how an error in one of them ends all."""

import contextlib
import json
import logging
import os
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping

import jax
import numpy as np
from jax.experimental import multihost_utils

from qi2_jax.runtime import errors, logs, meeting, signals

_log = logging.getLogger(__name__)

JOINING = 300  # seconds that JAX waits for the other processes to connect
HEARTBEAT = 60  # seconds without a sign of life after which a process counts as dead, and all others end
LEAVING = 60  # seconds that a process waits for the others when it ends

_PADDING = 1024  # bytes; the sizes of messages are rounded up to multiples
_STOPPED = "\0"  # precedes the name of a signal, so that it is not taken for the text of an error
_WAITING = "\1"  # precedes the name of a signal that waits until a step is complete


@contextlib.contextmanager
def joined(group: meeting.Group) -> Iterator[None]:
    """Connects this process with the others while a block runs. Without a group of processes it does nothing.

    JAX must not have been used yet. An error in the block is printed and ends this process with a non-zero status. It
    does not wait for collectives that only the other processes could complete. They end within `LEAVING` or
    `HEARTBEAT` seconds.

    Args:
      group: number of this process, and how the processes find each other.

    Raises:
      ValueError: if the processes cannot connect.
    """
    if not group.distributed and group.processes is None:
        yield
        return
    if not group.distributed:
        meeting.meet(group)
    else:
        _log.info("waiting up to %d s for the processes that the cluster names", JOINING)
    # JAX would handle SIGTERM itself, and a second one would kill the process.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            group.coordinator,
            group.processes,
            group.process,
            initialization_timeout=JOINING,
            heartbeat_timeout_seconds=HEARTBEAT,
            shutdown_timeout_seconds=LEAVING,
        )
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"the processes cannot connect to each other: {error}") from error
    logs.name_process(jax.process_index(), jax.process_count())
    signals.listen(interruptible=False)  # all processes must agree on a signal that one of them received
    try:
        yield
        gather("")  # JAX limits the time between the first and the last process that shuts down
    except BaseException as error:
        if isinstance(error, signals.Terminated) or (isinstance(error, SystemExit) and not error.code):
            raise
        _leave(group.verb, error)


def _leave(verb: str, error: BaseException) -> None:
    """Prints the error and ends this process, if possible after the others have noticed."""
    if isinstance(error, jax.errors.JaxRuntimeError) and not os.environ.get(errors.TRACEBACK):
        error = ValueError(f"stopped, perhaps because another process failed; look at its output first. {error}")
    if text := errors.explain(verb, error):
        print(text, file=sys.stderr)
    else:
        traceback.print_exception(error)
    sys.stdout.flush()
    sys.stderr.flush()
    # A normal exit would wait for threads that wait for other processes.
    leaving = threading.Thread(target=_shut_down, daemon=True)
    leaving.start()
    leaving.join(LEAVING)
    os._exit(1)


def _shut_down() -> None:
    with contextlib.suppress(Exception):  # the other processes may be gone
        jax.distributed.shutdown()


def gather(text: str) -> list[str]:
    """Returns the texts of all processes, by process index. Every process must call it, from its main thread."""
    if jax.process_count() == 1:
        return [text]
    data = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(data.size)).reshape(-1)
    # Each length needs a compiled program, so there should be few.
    padded = np.zeros(_PADDING * max(-(-int(sizes.max()) // _PADDING), 1), np.uint8)
    padded[: data.size] = data
    rows = multihost_utils.process_allgather(padded).reshape(len(sizes), -1)
    return [bytes(row[:size]).decode(errors="replace") for row, size in zip(rows, sizes, strict=True)]


def mean(values: Mapping[str, float]) -> dict[str, float]:
    """Means over the processes. All of them must pass the same names."""
    all_values = [json.loads(text) for text in gather(json.dumps(values))]
    return {name: sum(each[name] for each in all_values) / len(all_values) for name in values}


@contextlib.contextmanager
def raise_together(*, interruptible: bool = True) -> Iterator[None]:
    """A block without communication that all processes leave together.

    An error in one process is raised in all of them. A signal to one of them ends all, once the others have completed
    the block.

    Args:
      interruptible: whether a signal ends the block; False during training steps, where signals wait.

    Raises:
      ValueError: with the message of another process's error. The process itself raises its original error.
      signals.Terminated: after SIGTERM, SIGINT or SIGHUP.
    """
    guard = signals.interruptible if interruptible else contextlib.nullcontext
    if jax.process_count() == 1:
        with guard():
            yield
        return
    failure: BaseException | None = None
    text = ""
    try:
        with guard():
            yield
    except signals.Terminated as stopped:
        failure, text = stopped, _STOPPED + signals.name()
    except Exception as error:
        failure, text = error, str(error) or type(error).__name__
    if failure is None and signals.received():
        text = _WAITING + signals.name()
    texts = gather(text)
    if failure is not None and not isinstance(failure, signals.Terminated):
        raise failure
    stopped_by = [_signal_name(text, _STOPPED) for text in texts]
    waiting = [_signal_name(text, _WAITING) for text in texts]
    for index, (text, *names) in enumerate(zip(texts, stopped_by, waiting, strict=True)):
        if text and not any(names):
            raise ValueError(f"process {index}: {text}")
    _record_first(waiting)
    if _record_first(stopped_by):
        if jax.process_index() == 0:
            print(signals.stopped_message(), file=sys.stderr)
        raise signals.Terminated(reported=True)


def _signal_name(text: str, mark: str) -> str:
    """The name of the signal behind a mark in a process's text; "" for other texts."""
    name = text.removeprefix(mark)
    return name if text.startswith(mark) and name in {number.name for number in signals.STATUS} else ""


def _record_first(names: list[str]) -> bool:
    """Records the first signal of any process, so that all exit with the same status; False if there is none."""
    first = next((name for name in names if name), "")
    if first:
        signals.record_remote(first)
    return bool(first)


def all_true(yes: bool) -> bool:
    """Whether the argument is true in every process. Every process must call it, from its main thread."""
    return set(gather("yes" if yes else "no")) == {"yes"}


def terminating() -> bool:
    """Whether any process received a signal that ends the program. Every process must call it, from its main thread."""
    return _record_first(gather(signals.name() if signals.received() else ""))


def log_on_main(text: str) -> None:
    """Logs a message in process 0."""
    if jax.process_index() == 0:
        _log.info("%s", text)
