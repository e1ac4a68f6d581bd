"""The processes of a program find each other or say within seconds what is wrong; real processes and real sockets."""

import os
import pathlib
import socket
import subprocess
import sys
import threading
import time

import pytest

from qi2_jax.runtime import meeting

ROOT = pathlib.Path(__file__).parents[2]
PROGRAM = """
import logging, sys
from qi2_jax.runtime import meeting
logging.basicConfig(level=logging.INFO)
meeting.REPORT_EVERY = 0.5
index, count, address, deadline = sys.argv[1:]
try:
    meeting.meet(meeting.Group('test', address, int(count), int(index), join_seconds=float(deadline)))
except ValueError as error:
    raise SystemExit(str(error))
print("met")
"""


@pytest.fixture
def address() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def start(index: int, count: int, address: str, deadline: float = 120) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(index), str(count), address, str(deadline)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def wait_for(message: str, process: subprocess.Popen) -> None:
    """Reads the messages of a process until one contains `message`."""
    assert any(message in line for line in process.stderr), f"{message!r} did not come"


def ended(process: subprocess.Popen) -> tuple[int, str]:
    out, err = process.communicate(timeout=60)
    assert "Traceback" not in err
    return process.returncode, out + err


def test_processes_meet_in_any_order_and_the_port_is_free_again(address):
    processes = [start(index, 3, address) for index in (2, 1, 0)]
    assert [ended(process)[0] for process in processes] == [0, 0, 0]
    with socket.create_server(("127.0.0.1", int(address.rpartition(":")[2]))):
        pass


def test_waiting_says_how_many_are_there_and_who_is_missing(address):
    processes = [start(0, 3, address), start(1, 3, address)]
    for process in processes:
        wait_for(f"2 of 3 processes are there, missing: 2 at {address}", process)
    processes.append(start(2, 3, address))
    assert ["met" in ended(process)[1] for process in processes] == [True, True, True]


def test_a_number_that_is_given_twice_ends_all_and_names_both(address):
    processes = [start(0, 3, address, 120), start(1, 3, address), start(1, 3, address)]
    for status, text in map(ended, processes):
        assert status == 1 and "--process 1 was given twice: at " in text and text.count(", pid ") == 2


def test_process_0_given_twice_names_the_port(address):
    with socket.create_server(("", int(address.rpartition(":")[2]))):
        status, text = ended(start(0, 2, address))
    assert status == 1 and f"cannot listen on port {address.rpartition(':')[2]}" in text


def test_different_counts_end_both_and_are_named(address):
    processes = [start(0, 2, address), start(1, 3, address)]
    for status, text in map(ended, processes):
        assert status == 1 and "was started with --processes 3, process 0 with --processes 2" in text


@pytest.mark.parametrize("wrong", ["127.0.0.1:1", "no-such-host.invalid:7000"])
def test_a_wrong_address_is_named(wrong):
    status, text = ended(start(1, 2, wrong, 2))
    assert status == 1 and f"did not find process 0 at --coordinator {wrong} within 2 s" in text
    assert f"process 1 waits for process 0 at {wrong}" in text


def test_an_address_where_another_program_answers_is_named(address):
    def answer(listener):
        for _ in range(3):
            connection, _ = listener.accept()
            with connection:
                connection.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")
                time.sleep(0.2)

    with socket.create_server(("127.0.0.1", int(address.rpartition(":")[2]))) as listener:
        threading.Thread(target=answer, args=(listener,), daemon=True).start()
        status, text = ended(start(1, 2, address, 1))
    assert status == 1 and "another program answers there" in text


def test_process_0_names_who_did_not_come_and_is_not_confused_by_strangers(address):
    process = start(0, 3, address, 6)
    host, _, port = address.rpartition(":")
    for data in (b"GET / HTTP/1.0\r\n\r\n", b"\xff" * 10000, b"[1]\n", b""):
        for _ in range(100):
            try:
                with socket.create_connection((host, int(port))) as stranger:
                    stranger.sendall(data)
                break
            except OSError:
                time.sleep(0.1)
    status, text = ended(process)
    assert status == 1 and f"1 of 3 processes are there, missing: 1, 2 after 6 s at --coordinator {address}" in text


def test_a_process_that_is_started_again_takes_its_place(address):
    processes = [start(0, 3, address), start(1, 3, address)]
    wait_for("2 of 3 processes are there, missing: 2", processes[0])
    processes[1].kill()
    processes[1].communicate()
    processes[1:] = [start(1, 3, address), start(2, 3, address)]
    assert [ended(process)[0] for process in processes] == [0, 0, 0]


@pytest.mark.parametrize(
    "text", ["localhost", "localhost:", ":7000", "h:0", "h:65536", "h:x", "fd00::1:7000", "h:-1", ""]
)
def test_addresses_without_host_or_port_are_refused(text):
    with pytest.raises(ValueError, match="write it as HOST:PORT"):
        meeting.parse_address(text)


def test_addresses_are_parsed():
    assert meeting.parse_address("localhost:7000") == ("localhost", 7000)
    assert str(meeting.parse_address("[fd00::1]:7000")) == "[fd00::1]:7000"
