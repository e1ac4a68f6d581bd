"""SIGTERM is noted, waits where it must, and what it broke off ends with status 0, whatever became of the exception."""

import contextlib
import os
import signal
import subprocess
import sys

import pytest

from qi2_jax.runtime import signals


@pytest.fixture(autouse=True)
def restored():
    """Signals belong to the process: each test begins and leaves as if none had come."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)
    signals._received = signals._raised = signals._interruptible = False


def terminate() -> None:
    signal.raise_signal(signal.SIGTERM)


def test_it_ends_a_block_at_once():
    signals.listen(interruptible=False)
    with pytest.raises(signals.Terminated) as ended, signals.interruptible():
        terminate()
        pytest.fail("not reached")
    assert ended.value.code == 0


def test_one_that_came_before_ends_the_next_block():
    signals.listen(interruptible=False)
    terminate()
    with pytest.raises(signals.Terminated), signals.interruptible():
        pytest.fail("not reached")


def test_one_that_was_swallowed_ends_the_block_at_its_end():
    signals.listen(interruptible=True)
    swallowed = contextlib.suppress(BaseException)  # as a callback of the garbage collector does
    with pytest.raises(signals.Terminated), signals.interruptible(), swallowed:
        terminate()


def test_one_that_became_another_error_is_turned_back():
    signals.listen(interruptible=True)
    with pytest.raises(signals.Terminated), signals.interruptible():
        try:
            terminate()
        except BaseException:
            raise AttributeError("of an event loop") from None


def test_other_errors_stay_what_they_are():
    signals.listen(interruptible=True)
    with pytest.raises(AttributeError), signals.ending(), signals.interruptible():
        raise AttributeError
    with pytest.raises(AttributeError), signals.ending(), signals.deferred():
        terminate()
        raise AttributeError


def test_it_waits_any_number_of_times_and_then_ends_the_program():
    signals.listen(interruptible=True)
    with pytest.raises(signals.Terminated):
        with signals.deferred():
            terminate()
            terminate()
            assert signals.received()
        pytest.fail("not reached")


def test_in_deferred_blocks_only_blocks_that_allow_it_end():
    signals.listen(interruptible=True)
    with pytest.raises(signals.Terminated), signals.deferred():
        with signals.interruptible():
            pass
        terminate()
        with signals.interruptible():
            pytest.fail("not reached")


def test_a_second_one_does_not_break_what_the_first_ends():
    signals.listen(interruptible=True)
    with pytest.raises(signals.Terminated), signals.deferred(), signals.interruptible():
        terminate()
    terminate()
    assert signals.received()


def test_a_handler_that_was_there_before_gets_it_after_the_block():
    came = []
    signal.signal(signal.SIGTERM, lambda *_: came.append("after"))
    with signals.deferred():
        terminate()
        assert not came
    assert came == ["after"] and not signals.received()


PROGRAM = """
import signal
from qi2_jax.runtime import signals
signals.listen(interruptible=True)
with signals.ending():
    try:
        signal.raise_signal(signal.SIGTERM)
    except BaseException:
        raise AttributeError("of an event loop") from None
"""


def test_a_program_ends_with_status_0_and_further_signals_change_nothing():
    again = "import atexit, signal\natexit.register(lambda: signal.raise_signal(signal.SIGTERM))\n"
    command = [sys.executable, "-c", again + PROGRAM]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)
    assert done.returncode == 0 and done.stderr == "SIGTERM: stopped; run again to continue\n", done
