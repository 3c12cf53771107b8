# SPDX-License-Identifier: LGPL-2.1-or-later
"""A QEMU with some monitors, a multiplexer on a thread of its own, and clients that never wait without a deadline."""

from __future__ import annotations

import asyncio
import json
import os
import select
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from vmspawn.qmp.share.multiplexer import Multiplexer
from vmspawn.qmp.share.session import Session

#: Seconds that anything may take. Large commands take QEMU seconds, and the machine may be busy.
DEADLINE = 30.0

#: What multiplies the numbers of examples and rounds.
SCALE = float(os.environ.get("VMSPAWN_TEST_SCALE", "1"))

NEGOTIATE = b'{"execute":"qmp_capabilities"}'
NEGOTIATE_OOB = b'{"execute":"qmp_capabilities","arguments":{"enable":["oob"]}}'

#: A machine with a place to plug a device in, and one that is taken by `d0`.
PC = (
    *("-machine", "q35", "-accel", "tcg", "-m", "64"),
    *("-device", "pcie-root-port,id=port0,slot=1,chassis=1", "-device", "virtio-rng-pci,id=d0,bus=port0"),
    *("-device", "pcie-root-port,id=port1,slot=2,chassis=2"),
)

_T = TypeVar("_T")


def scaled(number: int) -> int:
    """A number of rounds, as large as VMSPAWN_TEST_SCALE says."""
    return max(1, round(number * SCALE))


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Wait for what nobody announces."""
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {DEADLINE:g} s"
        time.sleep(0.005)


class Client:
    """A QMP client that sends what it is told and reads line by line. Owns its socket."""

    def __init__(self, connected: socket.socket) -> None:
        self.socket = connected
        self.socket.settimeout(DEADLINE)
        self._buffer = b""

    def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Send bytes, the descriptors with the first of them; they stay the caller's."""
        if fds:
            assert socket.send_fds(self.socket, [data], fds) == len(data)
        else:
            self.socket.sendall(data)

    def line(self) -> bytes:
        """The next line, with its end; nothing at the end of the stream."""
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
        """The next line, decoded."""
        line = self.line()
        assert line, "the connection ended"
        message = json.loads(line)
        assert isinstance(message, dict)
        return message

    def execute(self, command: bytes, fds: Sequence[int] = ()) -> dict[str, Any]:
        """Send a command and return what comes next that is no event."""
        self.send(command, fds)
        while "event" in (message := self.message()):
            pass
        return message

    def run(self, name: str, *, fds: Sequence[int] = (), **arguments: object) -> dict[str, Any]:
        """Run a command; underscores in the names of arguments stand for hyphens."""
        members = {key.replace("_", "-"): value for key, value in arguments.items()}
        return self.execute(json.dumps({"execute": name, "arguments": members}).encode(), fds)

    def until(self, id: object) -> list[bytes]:
        """The lines before the reply with this id."""
        lines: list[bytes] = []
        while True:
            line = self.line()
            assert line, f"the connection ended before the reply {id!r}; there were {lines}"
            if _id_of(line) == id:
                return lines
            lines.append(line)

    def negotiate(self, *, oob: bool = False) -> Client:
        """Read the greeting and begin."""
        assert "QMP" in self.message()
        assert self.execute(NEGOTIATE_OOB if oob else NEGOTIATE) == {"return": {}}
        return self

    def quiet(self) -> bool:
        """Whether nothing is there to be read, for the moment."""
        return not self._buffer and not select.select([self.socket], [], [], 0.05)[0]

    def at_end(self) -> bool:
        """Whether the stream has ended; waits for something to come."""
        return self.line() == b""

    def close(self) -> None:
        """Go away without a word."""
        self.socket.close()


def _id_of(line: bytes) -> object:
    try:
        return json.loads(line).get("id")
    except (ValueError, RecursionError):
        # QEMU writes infinity as `inf`, and nests deeper than Python can decode.
        return None


class Kind(Enum):
    """How QEMU is told to serve a monitor."""

    OPTION = "-mon"
    #: Since QEMU 11.1, where the option is deprecated.
    OBJECT = "-object monitor-qmp"


@cache
def kinds(qemu: str) -> tuple[Kind, ...]:
    """The kinds that a QEMU knows, the one that it prefers last."""
    known = subprocess.run([qemu, "-object", "help"], check=True, capture_output=True, text=True).stdout.split()
    return (Kind.OPTION, Kind.OBJECT) if "monitor-qmp" in known else (Kind.OPTION,)


class Machine:
    """A QEMU without a machine, that serves monitors. Use as a context."""

    def __init__(
        self,
        qemu: str,
        monitors: int = 3,
        arguments: Sequence[str] = (),
        options: str = "",
        kind: Kind | None = None,
    ) -> None:
        """`options` are the monitors', `kind` is theirs too; by default what this QEMU prefers."""
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
        """A monitor's socket."""
        return self.folder / f"monitor{number}"

    def connect(self, number: int) -> socket.socket:
        """A connection to a monitor, which greets."""
        connected = socket.socket(socket.AF_UNIX)
        connected.settimeout(DEADLINE)
        connected.connect(str(self.path(number)))
        return connected

    def native(self, number: int = 0) -> Client:
        """A client of a monitor."""
        return Client(self.connect(number))

    def kill(self) -> None:
        """End it as a crash would."""
        self.process.kill()
        self.process.wait()

    def descriptors(self) -> int:
        """How many it has open."""
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._stack.close()


class Server:
    """A multiplexer that runs on a thread of its own. Use as a context."""

    def __init__(self, connected: socket.socket, bulk: socket.socket | None = None) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        #: Why QEMU was lost, each time that was said.
        self.lost: list[str] = []
        self._stack = ExitStack()
        self._stack.callback(self._stop)
        self._monitors = connected, bulk

    def start(self, timeout: float = DEADLINE) -> Server:
        """Negotiate with QEMU."""
        self.multiplexer: Multiplexer = self.wait(
            Multiplexer.connect(*self._monitors, on_lost=self.lost.append, timeout=timeout)
        )
        self._stack.callback(lambda: self.wait(self.multiplexer.close()))
        return self

    def wait(self, coroutine: Any) -> Any:
        """Run a coroutine on the multiplexer's loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(DEADLINE)

    def call(self, function: Callable[[], _T]) -> _T:
        """Call a function on the multiplexer's loop."""

        async def called() -> _T:
            return function()

        result: _T = self.wait(called())
        return result

    def open(self, *, read_only: bool = False, initial: bytes = b"") -> Client:
        """A client of a new session, which greets."""
        ours, theirs = socket.socketpair()
        self.call(lambda: self.multiplexer.open(theirs, read_only=read_only, initial=initial))
        return Client(ours)

    def sessions(self) -> tuple[Session, ...]:
        """The sessions that there are."""
        return self.call(lambda: self.multiplexer.sessions)

    def _stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(DEADLINE)
        self._loop.close()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


class Side:
    """One of the two ways to be a client of a shared QEMU, native or by sessions. Use as a context."""

    def __init__(self, who: str, machine: Machine, server: Server) -> None:
        self.native = who == "native"
        self.machine = machine
        self.server = server
        self._opened: list[Client] = []

    def greeted(self) -> Client:
        """A client that has its greeting still to read. There are as many native ones as the machine has monitors."""
        # Monitors 0 and 1 are the multiplexer's.
        client = self.machine.native(2 + len(self._opened)) if self.native else self.server.open()
        self._opened.append(client)
        return client

    def open(self, *, oob: bool = False) -> Client:
        """A client that has negotiated."""
        return self.greeted().negotiate(oob=oob)

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *_: object) -> None:
        for client in self._opened:
            client.close()


@contextmanager
def shared(
    qemu: str, *, monitors: int = 3, arguments: Sequence[str] = (), kind: Kind | None = None
) -> Iterator[tuple[Machine, Server]]:
    """A QEMU whose monitors 0 and 1 are a multiplexer's, and whose others are for native clients."""
    with (
        Machine(qemu, monitors, arguments, kind=kind) as machine,
        Server(machine.connect(0), machine.connect(1)) as server,
    ):
        yield machine, server.start()
