"""Signals are recorded, wait where they must, and end the program, whatever became of the exception they raised."""

import contextlib
import os
import pty
import signal
import subprocess
import sys

import pytest

from qi2_jax.runtime import signals


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    """Signals belong to the process: each test starts and ends as if there had been none."""
    before = {number: signal.getsignal(number) for number in (*signals.STATUS, signal.SIGUSR1)}
    monkeypatch.setattr(signals, "_watching", True)  # no thread that ends pytest at the second Ctrl-C
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    signals._received = signals._remote = None
    signals._raised = signals._interruptible = False
    signals._resumable = True


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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_the_exit_status_tells_which_signal_it_was(number):
    signals.listen(interruptible=True)
    with pytest.raises(signals.Terminated) as ended, signals.deferred():
        signal.raise_signal(number)
        assert signals.received() and signals.name() == number.name
    assert ended.value.code == {signal.SIGTERM: 0, signal.SIGINT: 130, signal.SIGHUP: 129}[number]


def test_a_cluster_can_ask_for_another_status_than_that_of_a_finished_command(monkeypatch):
    monkeypatch.setenv(signals.STOPPED_STATUS, "75")
    signals.record_remote("SIGTERM")  # another process of the same program was stopped
    assert signals.Terminated().code == 75
    signals.listen(interruptible=False, resumable=False)
    assert signals.Terminated().code == 143
    for wrong in ("", "-1", "126", "x", "٣"):
        monkeypatch.setenv(signals.STOPPED_STATUS, wrong)
        with pytest.raises(ValueError, match=signals.STOPPED_STATUS):
            signals.stopped_status()


def test_the_first_signal_decides_the_status():
    signals.listen(interruptible=False)
    signal.raise_signal(signal.SIGINT)
    terminate()
    assert signals.Terminated().code == 130


def test_a_command_that_cannot_be_resumed_does_not_claim_success_after_sigterm():
    signals.listen(interruptible=True, resumable=False)
    with pytest.raises(signals.Terminated) as ended:
        terminate()
    assert ended.value.code == 143 and signals.stopped_message() == "SIGTERM: stopped"


def test_without_a_signal_here_the_status_is_that_of_the_process_that_received_one():
    signals.record_remote("SIGINT")
    assert not signals.received() and signals.Terminated().code == 130


def test_ignored_signals_stay_ignored():
    """As `nohup` and shells ask for background jobs."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signals.listen(interruptible=True)
    with signals.deferred():
        signal.raise_signal(signal.SIGHUP)
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN and not signals.received()


def test_ctrl_c_after_a_deferred_block_is_a_keyboard_interrupt_for_library_users():
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(KeyboardInterrupt), signals.deferred():
        signal.raise_signal(signal.SIGINT)
    assert not signals.received()


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


def run_program(program: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)


def test_a_program_ends_with_status_0_and_further_signals_change_nothing():
    again = "import atexit, signal\natexit.register(lambda: signal.raise_signal(signal.SIGTERM))\n"
    done = run_program(again + PROGRAM)
    assert done.returncode == 0 and done.stderr == "SIGTERM: stopped; run again to continue\n", done


SAVING = """
import pathlib, sys, time
from qi2_jax.runtime import signals
{settings}
signals.listen(interruptible=True)
with signals.ending(), signals.deferred():
    print("steps", flush=True)
    while not signals.received():
        time.sleep(0.01)
    if sys.argv[1:]:
        {saving}
    print("saved", flush=True)
"""


def start_saving(saving: str = "pass", settings: str = "", **options) -> subprocess.Popen:
    """A program in its own session that saves after a signal."""
    command = [sys.executable, "-c", SAVING.format(saving=saving, settings=settings), "slowly"]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True} | options
    return subprocess.Popen(command, **options)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_real_process_saves_and_says_in_one_line_why_it_ended(number, status):
    process = start_saving()
    assert process.stdout.readline() == "steps\n"
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (status, "saved\n"), err
    assert err == f"{number.name}: stopped; run again to continue\n"


@pytest.mark.parametrize(
    "saving", ["time.sleep(600)", "import hashlib; hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)"]
)
def test_the_second_ctrl_c_ends_at_once_and_a_forwarded_copy_of_the_first_does_not(saving):
    """The second case is a call into a library, during which Python runs no signal handler."""
    process = start_saving(saving, "signals.REPEAT_AFTER, signals.HINT_AFTER = 1.0, 1.1")
    assert process.stdout.readline() == "steps\n"
    for _ in range(2):  # as `uv run` does, which forwards what the terminal has delivered already
        process.send_signal(signal.SIGINT)
    assert "press Ctrl-C again" in process.stderr.readline()  # the watcher saw the first long enough ago
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "", "SIGINT: ended at once\n")


def test_a_save_that_takes_long_says_how_to_end_at_once():
    process = start_saving("time.sleep(5)", "signals.HINT_AFTER = 0.5")
    assert process.stdout.readline() == "steps\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130 and err.startswith("SIGINT: finishing the work in progress; press Ctrl-C again")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_output_that_nobody_reads_any_more_does_not_prevent_the_save(number, tmp_path):
    """Ctrl-C ends the `tee` behind a pipe as well, and a closed terminal refuses every write."""
    reader, writer = os.pipe()
    saving = f"print('saving', flush=True); pathlib.Path({str(tmp_path / 'saved')!r}).touch()"
    process = start_saving(saving, stdout=writer, stderr=writer)
    os.close(writer)
    assert os.read(reader, 5) == b"steps"
    os.close(reader)
    process.send_signal(number)
    assert process.wait(timeout=30) == signals.STATUS[number]
    assert (tmp_path / "saved").exists()


def test_a_closed_terminal_is_a_hangup_after_which_the_state_is_saved(tmp_path):
    control, terminal = pty.openpty()
    saving = f"print('saving', flush=True); pathlib.Path({str(tmp_path / 'saved')!r}).touch()"
    program = "import fcntl, termios\nfcntl.ioctl(0, termios.TIOCSCTTY, 0)\n" + SAVING.format(
        saving=saving, settings=""
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, "slowly"],
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
    )
    os.close(terminal)
    assert os.read(control, 5) == b"steps"
    os.close(control)
    assert process.wait(timeout=30) == 129
    assert (tmp_path / "saved").exists()
