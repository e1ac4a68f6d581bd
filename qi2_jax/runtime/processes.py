"""Several processes as one program: how they join, how they agree, and how an error in one of them ends all."""

import argparse
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

JOINING = 300  # seconds for which JAX waits for processes that a cluster names
HEARTBEAT = 60  # seconds of silence after which a process counts as dead, and all others end
LEAVING = 60  # seconds for which a process that ends waits for the others

_PADDING = 1024  # texts are sent in multiples of so many bytes
_STOPPED = "\0"  # in front of a signal's name, which no error's text is mistaken for


@contextlib.contextmanager
def joined(arguments: argparse.Namespace) -> Iterator[None]:
    """Makes this process one of those that the arguments name, for a block; nothing happens where they name none.

    JAX must not have been used yet. An error in the block is printed and ends this process with a status that is not 0,
    without waiting for what only the others could finish; these are ended too, within `LEAVING` or `HEARTBEAT` seconds.

    Raises:
      ValueError: if the processes do not come together.
    """
    if not arguments.distributed and arguments.processes is None:
        yield
        return
    if arguments.coordinator is not None and not arguments.distributed:
        address = meeting.parse_address(arguments.coordinator)
        meeting.meet(address, arguments.processes, arguments.process, arguments.join_seconds)
    else:
        _log.info("waiting up to %d s for the processes that the cluster names", JOINING)
    # JAX would answer SIGTERM itself, and the second one would kill.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            arguments.coordinator,
            arguments.processes,
            arguments.process,
            initialization_timeout=JOINING,
            heartbeat_timeout_seconds=HEARTBEAT,
            shutdown_timeout_seconds=LEAVING,
        )
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"the processes did not come together: {error}") from error
    logs.name_process(jax.process_index(), jax.process_count())
    signals.listen(interruptible=False)  # what one process gets, all must agree on
    try:
        yield
        gather("")  # nobody waits at the door for those that still have work to do
    except BaseException as error:
        if isinstance(error, signals.Terminated) or (isinstance(error, SystemExit) and not error.code):
            raise
        _leave(arguments.verb, error)


def _leave(verb: str, error: BaseException) -> None:
    """Says what happened and ends this process, after the others if they end as well."""
    if isinstance(error, jax.errors.JaxRuntimeError) and not os.environ.get(errors.TRACEBACK):
        error = ValueError(f"stopped, perhaps because another process did; look there first. {error}")
    if text := errors.explain(verb, error):
        print(text, file=sys.stderr)
    else:
        traceback.print_exception(error)
    sys.stdout.flush()
    sys.stderr.flush()
    # The interpreter's own end would wait for threads that wait for other processes.
    leaving = threading.Thread(target=_shut_down, daemon=True)
    leaving.start()
    leaving.join(LEAVING)
    os._exit(1)


def _shut_down() -> None:
    with contextlib.suppress(Exception):  # that of the others' absence
        jax.distributed.shutdown()


def gather(text: str) -> list[str]:
    """What each process says, by index, for all of them. Every process must call it, from its main thread."""
    if jax.process_count() == 1:
        return [text]
    said = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(said.size)).reshape(-1)
    # Every length is a program of its own, which all would compile: there are to be few.
    padded = np.zeros(_PADDING * max(-(-int(sizes.max()) // _PADDING), 1), np.uint8)
    padded[: said.size] = said
    rows = multihost_utils.process_allgather(padded).reshape(len(sizes), -1)
    return [bytes(row[:size]).decode(errors="replace") for row, size in zip(rows, sizes, strict=True)]


def mean(values: Mapping[str, float]) -> dict[str, float]:
    """Means over the processes, of values that all of them have."""
    told = [json.loads(text) for text in gather(json.dumps(values))]
    return {name: sum(own[name] for own in told) / len(told) for name in values}


@contextlib.contextmanager
def agreed(*, interruptible: bool = True) -> Iterator[None]:
    """A block without communication that all processes leave together: what goes wrong in one is raised in all, and
    a signal to one ends all with the signal's status when the others are done.

    Args:
      interruptible: False where signals must wait, as they do while steps are taken.

    Raises:
      ValueError: with what another process raised; each raises its own error as it is.
      signals.Terminated: after SIGTERM, SIGINT or SIGHUP.
    """
    guard = signals.interruptible if interruptible else contextlib.nullcontext
    if jax.process_count() == 1:
        with guard():
            yield
        return
    own: BaseException | None = None
    try:
        with guard():
            yield
    except signals.Terminated as stopped:
        own, text = stopped, _STOPPED + signals.name()
    except Exception as error:
        own, text = error, str(error) or type(error).__name__
    told = gather("" if own is None else text)
    if own is not None and not isinstance(own, signals.Terminated):
        raise own
    names = [_signal_name(text) for text in told]
    for index, (text, name) in enumerate(zip(told, names, strict=True)):
        if text and not name:
            raise ValueError(f"process {index}: {text}")
    if _hear(names):
        say(signals.stopped_message())
        raise signals.Terminated(told=True)


def _signal_name(text: str) -> str:
    """The name of the signal in what a process says of itself; "" for anything else."""
    name = text.removeprefix(_STOPPED)
    return name if text.startswith(_STOPPED) and name in {number.name for number in signals.STATUS} else ""


def _hear(names: list[str]) -> bool:
    """Records the first signal of any process, so that all exit with the same status; False if there is none."""
    first = next((name for name in names if name), "")
    if first:
        signals.hear(first)
    return bool(first)


def all_say(yes: bool) -> bool:
    """Whether every process says yes. Every process must ask, from its main thread."""
    return set(gather("yes" if yes else "no")) == {"yes"}


def terminating() -> bool:
    """Whether any process received a signal that ends the program. Every process must ask, from its main thread."""
    return _hear(gather(signals.name() if signals.received() else ""))


def say(text: str) -> None:
    """Logs a message in process 0."""
    if jax.process_index() == 0:
        _log.info("%s", text)
