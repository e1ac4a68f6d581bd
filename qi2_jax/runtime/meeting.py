"""Lets the processes of a program find each other over plain TCP before JAX's coordination service starts.

If an address is wrong or a process number is given twice, JAX waits silently for five minutes and then ends the process
with a C++ stack. Here process 0 listens on the coordinator's port, counts who connects, and closes
the port again for JAX. Every process reports the progress and names the address or the number that is wrong.

A message is one line of JSON. Each process identifies itself; process 0 answers with the number of processes that have
arrived, and at the end with "go" or with the error that ends all of them.
"""

import contextlib
import dataclasses
import json
import logging
import os
import selectors
import socket
import time
from typing import Any, NamedTuple

_log = logging.getLogger(__name__)

DEADLINE = 50.0  # seconds
REPORT_EVERY = 5.0  # seconds
_RETRY = 0.5  # seconds
_MAX_LINE = 4096  # bytes
_PROGRAM = "qi2"


class Address(NamedTuple):
    """A host and a port."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_address(text: str) -> Address:
    """Parses HOST:PORT or [IPV6]:PORT.

    Raises:
      ValueError: for anything else.
    """
    host, colon, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]") if host.startswith("[") else host
    valid = colon and host and port.isascii() and port.isdecimal() and 0 < int(port) < 1 << 16
    if not valid or (":" in host and not text.startswith("[")):
        raise ValueError(
            f"--coordinator is {text!r}; write it as HOST:PORT with a port from 1 to 65535 that is free on the host of "
            "process 0, such as 10.0.0.1:7000 or [fd00::1]:7000"
        )
    return Address(host, int(port))


@dataclasses.dataclass(frozen=True)
class Group:
    """The settings by which this process joins several.

    Attributes:
      verb: command, for error messages.
      coordinator: host of process 0 with a port, see `parse_address`.
      processes: number of processes; None: one, or as the cluster reports.
      process: number of this process.
      distributed: whether JAX asks the cluster for the values that are missing here.
      join_seconds: time to wait for the others.
    """

    verb: str
    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None
    distributed: bool = False
    join_seconds: float = DEADLINE


def meet(group: Group) -> None:
    """Returns in every process once all of them have arrived.

    Args:
      group: with coordinator, number of processes and number of this process.

    Raises:
      ValueError: if they do not arrive in time, a number is given twice, the processes disagree about their number, or
        the port is taken.
    """
    count, index, deadline = group.processes, group.process, group.join_seconds
    assert group.coordinator is not None and count is not None and index is not None  # checked by the command line
    address = parse_address(group.coordinator)
    end = time.monotonic() + deadline
    if index:
        _join(address, count, index, end, deadline)
    elif count > 1:
        with contextlib.ExitStack() as stack:
            _Host(address, count, stack).wait(end, deadline)


class _Line:
    """One end of a connection that exchanges lines of JSON."""

    def __init__(self, connection: socket.socket):
        self.socket, self._buffer = connection, b""
        self.about: dict[str, Any] = {}

    def send(self, message: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # a process that is gone is noticed when its connection is read
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> dict[str, Any] | None:
        """The next message, or None if it is not complete yet.

        Raises:
          ConnectionError: at the end of the connection, or if the other side speaks another protocol.
        """
        if b"\n" not in self._buffer:
            data = self.socket.recv(_MAX_LINE)
            if not data:
                raise ConnectionError("the connection was closed")
            self._buffer += data
        line, newline, rest = self._buffer.partition(b"\n")
        if not newline and len(line) < _MAX_LINE:
            return None
        self._buffer = rest
        try:
            message = json.loads(line)
        except ValueError:
            message = None
        if not isinstance(message, dict) or message.get("program") != _PROGRAM:
            raise ConnectionError("another program answers there")
        return message

    def is_closed(self) -> bool:
        """Whether the other side has closed the connection."""
        self.socket.setblocking(False)
        try:
            return self.socket.recv(1, socket.MSG_PEEK) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True
        finally:
            self.socket.settimeout(1)


class _Host:
    """Process 0: counts the others."""

    def __init__(self, address: Address, count: int, stack: contextlib.ExitStack):
        self._address, self._count, self._stack = address, count, stack
        self._arrived: dict[int, _Line] = {}
        self._selector = stack.enter_context(selectors.DefaultSelector())
        try:
            self._listener = stack.enter_context(_listen(address.port))
        except OSError as error:
            raise ValueError(
                f"process 0 cannot listen on port {address.port} of --coordinator {address}: {error.strerror}. Another "
                "process 0 or another program may use it; choose another port, or stop that program"
            ) from None
        self._selector.register(self._listener, selectors.EVENT_READ)

    def wait(self, end: float, deadline: float) -> None:
        report = time.monotonic() + REPORT_EVERY
        while len(self._arrived) < self._count - 1:
            now = time.monotonic()
            if now >= end:
                raise self._refused(f"{self._progress()} after {deadline:.0f} s at --coordinator {self._address}")
            if now >= report:
                report = now + REPORT_EVERY
                _log.info("%s at %s", self._progress(), self._address)
                self._send_all({"progress": self._progress()})
            for key, _ in self._selector.select(min(end, report) - now):
                self._accept() if key.data is None else self._read(key.data)
        self._listener.close()  # the port is JAX's from here on
        self._send_all({"go": True})

    def _progress(self) -> str:
        missing = [index for index in range(1, self._count) if index not in self._arrived]
        named = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
        return f"{len(self._arrived) + 1} of {self._count} processes are there, missing: {named}"

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            connection, _ = self._listener.accept()
            connection.settimeout(1)
            self._stack.enter_context(connection)
            self._selector.register(connection, selectors.EVENT_READ, _Line(connection))

    def _read(self, line: _Line) -> None:
        try:
            message = line.receive()
        except OSError:  # gone, or a port scanner
            self._selector.unregister(line.socket)
            line.socket.close()
            if line.about and self._arrived.get(line.about["process"]) is line:
                del self._arrived[line.about["process"]]
            return
        if message is None or line.about:
            return
        index, count = message.get("process"), message.get("processes")
        line.about = {"process": index, "where": str(message.get("where"))[:256]}
        if count != self._count or not isinstance(index, int) or not 0 <= index < self._count:
            raise self._refused(
                f"process {index!r} at {line.about['where']} was started with --processes {count!r}, process 0 with "
                f"--processes {self._count}; give all of them the same number",
                line,
            )
        other = self._arrived.get(index)
        if other is not None and other.is_closed():  # it connects again
            other = None
        if other is not None or index == 0:
            raise self._refused(
                f"--process {index} was given twice: at {other.about['where'] if other else _where()} and at "
                f"{line.about['where']}; give each process a different number from 0 to {self._count - 1}",
                line,
            )
        self._arrived[index] = line

    def _send_all(self, message: dict[str, Any], *more: _Line) -> None:
        for line in (*self._arrived.values(), *more):
            line.send({"program": _PROGRAM, **message})

    def _refused(self, reason: str, *more: _Line) -> ValueError:
        """Tells the other processes why they end; returns the error that ends this one."""
        self._send_all({"error": reason}, *more)
        return ValueError(reason)


def _listen(port: int) -> socket.socket:
    """A listener on all addresses of this machine, including IPv6 where it is available."""
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):
            return socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))


def _where() -> str:
    return f"{socket.gethostname()}, pid {os.getpid()}"


def _join(address: Address, count: int, index: int, end: float, deadline: float) -> None:
    """A process other than 0: connects, and waits until all have arrived."""
    report, reason = time.monotonic() + REPORT_EVERY, "no answer"
    while (now := time.monotonic()) < end:
        try:
            with socket.create_connection(address, timeout=max(0.1, min(REPORT_EVERY, end - now))) as connection:
                line = _Line(connection)
                line.send({"program": _PROGRAM, "process": index, "processes": count, "where": _where()})
                _await_go(line, address)
                return
        except OSError as error:  # process 0 may not listen yet
            reason = error.strerror or str(error)
        if (now := time.monotonic()) >= report:
            report = now + REPORT_EVERY
            _log.info("process %d waits for process 0 at %s: %s", index, address, reason)
        time.sleep(min(_RETRY, max(0.0, end - now)))
    raise ValueError(
        f"process {index} did not find process 0 at --coordinator {address} within {deadline:.0f} s: {reason}. Check "
        "the address, that process 0 is running there, and that no firewall closes the port"
    )


def _await_go(line: _Line, address: Address) -> None:
    """Waits until process 0 answers "go".

    Raises:
      ValueError: if it refuses.
      OSError: if the connection ends.
    """
    while True:
        # While process 0 sends progress, it alone enforces the deadline.
        line.socket.settimeout(2 * REPORT_EVERY)
        message = line.receive()
        if message is None:
            continue
        if "error" in message:
            raise ValueError(str(message["error"]))
        if "go" in message:
            return
        _log.info("%s at %s", str(message.get("progress"))[:256], address)
