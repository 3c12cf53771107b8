# SPDX-License-Identifier: LGPL-2.1-or-later
"""Runs a QEMU with several monitors, a multiplexer on another thread, and clients whose waits have deadlines."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from tests.background import Background
from vmspawn.qmp.share.multiplexer import Multiplexer
from vmspawn.qmp.share.session import Session

#: Seconds that any step may take. Large commands take QEMU seconds, and the host may be busy.
DEADLINE = 60.0

#: The factor for the numbers of examples and rounds.
SCALE = float(os.environ.get("VMSPAWN_TEST_SCALE", "1"))

NEGOTIATE = b'{"execute":"qmp_capabilities"}'
NEGOTIATE_OOB = b'{"execute":"qmp_capabilities","arguments":{"enable":["oob"]}}'

#: A machine with two root ports: the device `d0` is in port0, and port1 is empty.
PC = (
    *("-machine", "q35", "-accel", "tcg", "-m", "64"),
    *("-device", "pcie-root-port,id=port0,slot=1,chassis=1", "-device", "virtio-rng-pci,id=d0,bus=port0"),
    *("-device", "pcie-root-port,id=port1,slot=2,chassis=2"),
)

#: The name and the arguments of a command.
Request = tuple[str, dict[str, Any]]

_T = TypeVar("_T")


def scaled(number: int) -> int:
    """Return a number of rounds, multiplied by VMSPAWN_TEST_SCALE."""
    return max(1, round(number * SCALE))


def request_id(command: Request) -> str:
    """Return the name of a command in the names of tests."""
    return str(command[1].get("command-line", "-".join((command[0], *map(str, command[1].values())))))


def wait_until(condition: Callable[[], bool], what: str, process: subprocess.Popen[Any] | None = None) -> None:
    """Poll until a condition holds that no event reports. `what` names the condition in the error.

    Fails at once if `process` ends before.
    """
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert process is None or process.poll() is None, f"the process ended before {what}"
        assert time.monotonic() < deadline, f"{what} did not happen within {DEADLINE:g} s"
        time.sleep(0.005)


class Client:
    """A QMP client that sends given bytes and reads line by line. Owns its socket."""

    def __init__(self, connected: socket.socket) -> None:
        self.socket = connected
        self.socket.settimeout(DEADLINE)
        self._buffer = b""

    @classmethod
    def connect(cls, path: str | Path) -> Client:
        """Connect to a path, and negotiate."""
        connected = socket.socket(socket.AF_UNIX)
        connected.settimeout(DEADLINE)
        connected.connect(str(path))
        return cls(connected).negotiate()

    def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Send bytes, with descriptors along with the first byte. The caller keeps the descriptors."""
        if fds:
            assert socket.send_fds(self.socket, [data], fds) == len(data)
        else:
            self.socket.sendall(data)

    def line(self) -> bytes:
        """Return the next line including its newline, or empty bytes at end of file."""
        while b"\n" not in self._buffer:
            try:
                data = self.socket.recv(65536)
            except ConnectionResetError:
                data = b""
            if not data:
                return b""
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line + b"\n"

    def message(self) -> dict[str, Any]:
        """Return the next line, decoded."""
        line = self.line()
        assert line, "the connection ended"
        message = json.loads(line)
        assert isinstance(message, dict)
        return message

    def execute(self, command: bytes, fds: Sequence[int] = ()) -> dict[str, Any]:
        """Send a command, and return the next message that is not an event."""
        self.send(command, fds)
        while "event" in (message := self.message()):
            pass
        return message

    def run(self, name: str, *, fds: Sequence[int] = (), **arguments: object) -> dict[str, Any]:
        """Run a command. Underscores in the names of arguments stand for hyphens."""
        members = {key.replace("_", "-"): value for key, value in arguments.items()}
        return self.execute(json.dumps({"execute": name, "arguments": members}).encode(), fds)

    def until(self, id: object) -> list[bytes]:
        """Return the lines before the reply with this id."""
        lines: list[bytes] = []
        while True:
            line = self.line()
            assert line, f"the connection ended before the reply {id!r}; there were {lines}"
            if _id_of(line) == id:
                return lines
            lines.append(line)

    def negotiate(self, *, oob: bool = False) -> Client:
        """Read the greeting, and negotiate."""
        assert "QMP" in self.message()
        assert self.execute(NEGOTIATE_OOB if oob else NEGOTIATE) == {"return": {}}
        return self

    def at_end(self) -> bool:
        """Wait for input; returns whether it is end of file."""
        return self.line() == b""

    def close(self) -> None:
        """Disconnect."""
        self.socket.close()


def _id_of(line: bytes) -> object:
    try:
        return json.loads(line).get("id")
    except (ValueError, RecursionError):
        # QEMU writes infinity as `inf`, and nests deeper than Python can decode.
        return None


class Kind(Enum):
    """The option that defines a monitor on QEMU's command line."""

    OPTION = "-mon"
    #: Since QEMU 11.1, which deprecates `-mon`.
    OBJECT = "-object monitor-qmp"


@cache
def kinds(qemu: str) -> tuple[Kind, ...]:
    """Return the kinds that a QEMU supports, the preferred one last."""
    known = subprocess.run([qemu, "-object", "help"], check=True, capture_output=True, text=True).stdout.split()
    return (Kind.OPTION, Kind.OBJECT) if "monitor-qmp" in known else (Kind.OPTION,)


class Machine:
    """A QEMU with monitors, and by default without a machine. A context manager."""

    def __init__(
        self,
        qemu: str,
        monitors: int = 3,
        arguments: Sequence[str] = (),
        options: str = "",
        kind: Kind | None = None,
    ) -> None:
        """`options` and `kind` are for all monitors; the default kind is the one that this QEMU prefers."""
        kind = kind or kinds(qemu)[-1]
        self._stack = ExitStack()
        self.folder = Path(tempfile.mkdtemp(prefix="vmspawn-qmp-"))
        self._stack.callback(shutil.rmtree, self.folder)
        command = [qemu, "-machine", "none", "-nodefaults", "-display", "none", "-S", *arguments]
        listening = []
        for number in range(monitors):
            listening.append(self._stack.enter_context(socket.socket(socket.AF_UNIX)))
            listening[-1].bind(str(self.path(number)))
            listening[-1].listen(8)
            command += ["-chardev", f"socket,id=c{number},fd={listening[-1].fileno()},server=on,wait=off"]
            if kind is Kind.OBJECT:
                command += ["-object", f"monitor-qmp,id=m{number},chardev=c{number}{options}"]
            else:
                command += ["-mon", f"chardev=c{number},mode=control{options}"]
        self.process = subprocess.Popen(
            command,
            pass_fds=[each.fileno() for each in listening],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def path(self, number: int) -> Path:
        """Return the path of a monitor's socket."""
        return self.folder / f"monitor{number}"

    def connect(self, number: int) -> socket.socket:
        """Connect to a monitor, which greets."""
        connected = socket.socket(socket.AF_UNIX)
        connected.settimeout(DEADLINE)
        connected.connect(str(self.path(number)))
        return connected

    def native(self, number: int = 0) -> Client:
        """Connect a client to a monitor."""
        return Client(self.connect(number))

    def kill(self) -> None:
        """Kill QEMU, as a crash would."""
        self.process.kill()
        self.process.wait()

    def descriptors(self) -> int:
        """Return the number of QEMU's open descriptors."""
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._stack.close()


class Server:
    """A multiplexer that runs on another thread. A context manager."""

    def __init__(self, connected: socket.socket, bulk: socket.socket | None = None) -> None:
        #: The reasons of `on_lost`, one for each call.
        self.lost: list[str] = []
        self._stack = ExitStack()
        self._background = self._stack.enter_context(Background(DEADLINE))
        self._monitors = connected, bulk

    def start(self, timeout: float = DEADLINE, *, deadline: float = DEADLINE) -> Server:
        """Negotiate with QEMU, which has `timeout` seconds for its greeting.

        Raises TimeoutError if the negotiation takes longer than `deadline` seconds.
        """

        async def connected() -> Multiplexer:
            async with asyncio.timeout(deadline):
                return await Multiplexer.connect(*self._monitors, on_lost=self.lost.append, timeout=timeout)

        self.multiplexer = self.wait(connected())
        self._stack.callback(lambda: self.wait(self.multiplexer.close()))
        return self

    def wait(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Run a coroutine on the multiplexer's loop."""
        return self._background.wait(work)

    def call(self, function: Callable[[], _T]) -> _T:
        """Call a function on the multiplexer's loop."""

        async def called() -> _T:
            return function()

        return self.wait(called())

    def open(self, *, read_only: bool = False, initial: bytes = b"") -> Client:
        """Open a session, which greets; returns its client."""
        ours, theirs = socket.socketpair()
        self.call(lambda: self.multiplexer.open(theirs, read_only=read_only, initial=initial))
        return Client(ours)

    def sessions(self) -> tuple[Session, ...]:
        """Return the multiplexer's sessions."""
        return self.call(lambda: self.multiplexer.sessions)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


class Side:
    """One of the two sides that a client can use: QEMU's own monitors (native), or sessions. A context manager."""

    def __init__(self, who: str, machine: Machine, server: Server) -> None:
        self.native = who == "native"
        self.machine = machine
        self.server = server
        self._opened: list[Client] = []

    def greeted(self) -> Client:
        """Return a client with an unread greeting. The number of native clients is limited by QEMU's monitors."""
        # Monitors 0 and 1 are for the multiplexer.
        client = self.machine.native(2 + len(self._opened)) if self.native else self.server.open()
        self._opened.append(client)
        return client

    def open(self, *, oob: bool = False) -> Client:
        """Return a client that has negotiated."""
        return self.greeted().negotiate(oob=oob)

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *_: object) -> None:
        for client in self._opened:
            client.close()


@contextmanager
def shared(
    qemu: str,
    *,
    monitors: int = 3,
    arguments: Sequence[str] = (),
    kind: Kind | None = None,
    deadline: float = DEADLINE,
) -> Iterator[tuple[Machine, Server]]:
    """Start a QEMU whose monitors 0 and 1 are for a multiplexer, and whose others are for native clients.

    Raises TimeoutError if QEMU does not negotiate within `deadline` seconds.
    """
    with (
        Machine(qemu, monitors, arguments, kind=kind) as machine,
        Server(machine.connect(0), machine.connect(1)) as server,
    ):
        yield machine, server.start(deadline=deadline)
