# SPDX-License-Identifier: LGPL-2.1-or-later
"""Compares a QMP session with a native monitor: round trips, throughput, fan-out, and the effect of busy neighbours.

One QEMU with `-machine none` serves a native monitor and, through a multiplexer in another process, the sessions. Both
are measured in turn in one run, so that a ratio holds if the machine's speed changes. A ratio is session ÷ native; for
a ratio of throughputs, more is better.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import multiprocessing
import os
import select
import socket
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

QEMU = os.environ.get("QEMU", "qemu-system-x86_64")

#: The number of round trips that are measured on each side, and the number before the other side's turn.
ROUNDS = 1500
BLOCK = 50
#: The number of commands in one measurement of throughput.
COMMANDS = 1280
#: The number of sessions that an event is sent to.
SESSIONS = 256
DEADLINE = 60.0

NEGOTIATE = b'{"execute":"qmp_capabilities"}'
SPACED = json.dumps({"execute": "query-status", "id": "__qmp#00001"}).encode()
MINIMAL = b'{"execute":"query-status","id":1}'
WITHOUT_ID = b'{"execute":"query-status"}'
SCHEMA = json.dumps({"execute": "query-qmp-schema", "id": "__qmp#00001"}).encode()


class Row(NamedTuple):
    """A line of the table."""

    what: str
    figure: str
    target: str = ""


class Client:
    """A blocking QMP client that does as little as possible."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(DEADLINE)
        self.socket.connect(str(path))
        self.lines(1)
        self.ask(NEGOTIATE)

    def lines(self, count: int) -> int:
        """Read `count` lines; returns their length in bytes."""
        size = 0
        while count > 0:
            data = self.socket.recv(1 << 18)
            if not data:
                raise SystemExit("a connection ended")
            size += len(data)
            count -= data.count(b"\n")
        return size

    def ask(self, command: bytes) -> float:
        """Run one command; returns the seconds of the round trip."""
        start = time.perf_counter()
        self.socket.sendall(command)
        self.lines(1)
        return time.perf_counter() - start


@contextlib.contextmanager
def clients(path: Path, count: int) -> Iterator[list[Client]]:
    """Connect `count` clients."""
    with contextlib.ExitStack() as stack:
        made = [Client(path) for _ in range(count)]
        for client in made:
            stack.enter_context(client.socket)
        yield made


# The measurements.


def round_trips(native: Path, shared: Path, command: bytes, rounds: int = ROUNDS) -> tuple[float, float]:
    """Return the median round trips through a session and natively."""
    with clients(shared, 1) as (session,), clients(native, 1) as (own,):
        figures: dict[Client, list[float]] = {session: [], own: []}
        for _ in range(rounds // BLOCK):
            for client, found in figures.items():
                client.ask(command)
                found += [client.ask(command) for _ in range(BLOCK)]
        return statistics.median(figures[session]), statistics.median(figures[own])


def qemu_qmp(native: Path, shared: Path) -> tuple[float, float]:
    """Return the same as `round_trips`, with the client of qemu.qmp."""
    from qemu.qmp import QMPClient

    async def run() -> tuple[float, float]:
        figures: list[list[float]] = [[], []]
        made = [QMPClient("bench"), QMPClient("bench")]
        for client, path in zip(made, (shared, native), strict=True):
            await client.connect(str(path))
        for _ in range(ROUNDS // BLOCK):
            for client, found in zip(made, figures, strict=True):
                await client.execute("query-status")
                for _ in range(BLOCK):
                    start = time.perf_counter()
                    await client.execute("query-status")
                    found.append(time.perf_counter() - start)
        for client in made:
            await client.disconnect()
        return statistics.median(figures[0]), statistics.median(figures[1])

    return asyncio.run(run())


def throughput(path: Path, command: bytes, count: int) -> float:
    """Return the commands a second of `count` clients together, which send all their commands before they read."""
    with clients(path, count) as made:
        left = {client.socket.fileno(): COMMANDS // count for client in made}
        sockets = {client.socket.fileno(): client.socket for client in made}
        poll = select.poll()
        start = time.perf_counter()
        for client in made:
            client.socket.sendall(command * (COMMANDS // count))
            poll.register(client.socket, select.POLLIN)
        while left:
            for fd, _ in poll.poll():
                left[fd] -= sockets[fd].recv(1 << 18).count(b"\n")
                if not left[fd]:
                    del left[fd]
                    poll.unregister(fd)
        return COMMANDS / (time.perf_counter() - start)


def aggregate(native: Path, shared: Path, command: bytes, count: int) -> float:
    """Return the throughput of `count` sessions ÷ that of one native monitor, as the median of five turns."""
    ratios = [throughput(shared, command, count) / throughput(native, command, 1) for _ in range(5)]
    return statistics.median(ratios)


def fan_out(shared: Path) -> float:
    """Return the seconds from sending `stop` until all sessions have STOP, as the longest of five."""
    with clients(shared, SESSIONS) as sessions, clients(shared, 1) as (actor,):

        def tell(command: bytes) -> float:
            start = time.perf_counter()
            actor.socket.sendall(command)
            for session in sessions:
                session.lines(1)
            took = time.perf_counter() - start
            actor.lines(2)
            return took

        figures = []
        for _ in range(5):
            # Without `cont`, the machine has never run and sends no STOP.
            tell(b'{"execute":"cont"}')
            figures.append(tell(b'{"execute":"stop"}'))
        return max(figures)


def neighbours(shared: Path) -> float:
    """Return the median round trip while `flood`, `stall` and `send_large` run ÷ the median while they do not."""
    with clients(shared, 1) as (honest,):
        quiet = [honest.ask(SPACED) for _ in range(400)]
        with contextlib.ExitStack() as stack:
            for misbehave in (flood, stall, send_large):
                stack.enter_context(process(misbehave, shared))
            loud = [honest.ask(SPACED) for _ in range(1500)]
        return statistics.median(loud) / statistics.median(quiet)


# The multiplexer and the busy clients, each in its own process.


def serve(main: Path, bulk: Path, listen: Path) -> None:
    """Serve all clients by a multiplexer, as a manager does."""
    from vmspawn.qmp.share.multiplexer import Multiplexer

    def connect(path: Path) -> socket.socket:
        connected = socket.socket(socket.AF_UNIX)
        connected.connect(str(path))
        return connected

    async def run() -> None:
        multiplexer = await Multiplexer.connect(connect(main), connect(bulk), on_lost=lambda why: os._exit(0))
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(listen) + ".new")
            listener.listen(512)
            listener.setblocking(False)
            os.rename(str(listen) + ".new", listen)
            asyncio.get_running_loop().add_reader(listener, lambda: multiplexer.open(listener.accept()[0]))
            await asyncio.Event().wait()

    asyncio.run(run())


def flood(shared: Path) -> None:
    """Send commands as fast as they are taken, and discard the replies."""
    client = Client(shared)
    client.socket.setblocking(False)
    while True:
        readable, writable, _ = select.select([client.socket], [client.socket], [])
        if readable:
            client.socket.recv(1 << 18)
        if writable:
            client.socket.send(SPACED * 100)


def stall(shared: Path) -> None:
    """Send many commands, and read nothing."""
    client = Client(shared)
    client.socket.sendall(SCHEMA * 20)
    time.sleep(DEADLINE)


def send_large(shared: Path) -> None:
    """Send commands of 1 MB, one after the other."""
    client = Client(shared)
    arguments = {"path": "/", "property": "x" * (1 << 20)}
    command = json.dumps({"execute": "qom-get", "arguments": arguments}).encode()
    while True:
        client.ask(command)


@contextlib.contextmanager
def process(function: Callable[..., None], *arguments: Path) -> Iterator[BaseProcess]:
    """Run a function in another process."""
    running = multiprocessing.get_context("spawn").Process(target=function, args=arguments)
    running.start()
    try:
        yield running
    finally:
        running.kill()
        running.join()


@contextlib.contextmanager
def qemu(paths: Sequence[Path]) -> Iterator[None]:
    """Run a QEMU with a monitor at each of these paths."""
    known = subprocess.run([QEMU, "-object", "help"], capture_output=True, check=True, text=True).stdout
    command = [QEMU, "-machine", "none", "-nodefaults", "-display", "none", "-S"]
    with contextlib.ExitStack() as stack:
        listeners = []
        for number, path in enumerate(paths):
            listeners.append(stack.enter_context(socket.socket(socket.AF_UNIX)))
            listeners[-1].bind(str(path))
            listeners[-1].listen(4)
            command += ["-chardev", f"socket,id=c{number},fd={listeners[-1].fileno()},server=on,wait=off"]
            if "monitor-qmp" in known:
                command += ["-object", f"monitor-qmp,id=m{number},chardev=c{number}"]
            else:
                command += ["-mon", f"chardev=c{number},mode=control"]
        running = subprocess.Popen(command, pass_fds=[each.fileno() for each in listeners])
    try:
        yield
    finally:
        running.kill()
        running.wait()


def wait_for(path: Path) -> None:
    """Wait until a socket exists."""
    deadline = time.monotonic() + DEADLINE
    while not path.exists():
        if time.monotonic() > deadline:
            raise SystemExit("the multiplexer did not come up")
        time.sleep(0.01)


# The table.


def rows(native: Path, shared: Path) -> Iterator[Row]:
    """Measure and yield the lines of the table."""
    for name, command, rounds, target in (
        ("query-status, spaced JSON", SPACED, ROUNDS, "≤ 0.85"),
        ("query-status, minimal JSON", MINIMAL, ROUNDS, "≤ 1.10"),
        ("query-status, minimal JSON without an id", WITHOUT_ID, ROUNDS, ""),
        ("query-qmp-schema", SCHEMA, 200, "≤ 1.05"),
    ):
        yield ratio(name, *round_trips(native, shared, command, rounds), target)
    yield ratio("query-status, qemu.qmp", *qemu_qmp(native, shared), "≤ 0.90")
    for count in (8, 32):
        for name, command, target in (("spaced", SPACED, "≥ 1.20"), ("minimal", MINIMAL, "≥ 0.90")):
            figure = aggregate(native, shared, command, count)
            yield Row(f"throughput, {count} sessions ÷ one monitor, {name} JSON", f"{figure:.2f}", target)
    yield Row(f"STOP to {SESSIONS} sessions", f"{fan_out(shared) * 1000:.1f} ms", "≤ 10 ms")
    yield Row("p50 beside a flood, a stall and 1 MB ÷ quiet", f"{neighbours(shared):.2f}", "≤ 3.00")


def ratio(name: str, session: float, native: float, target: str) -> Row:
    """Return the ratio of two medians as a line of the table."""
    return Row(f"{name} (p50 {session * 1e6:.0f} ÷ {native * 1e6:.0f} µs)", f"{session / native:.2f}", target)


def main() -> None:
    """Measure and print all figures."""
    print(f"{'QMP, session ÷ native':<66}{'measured':>10}  target", flush=True)
    with tempfile.TemporaryDirectory(prefix="vmspawn-bench-") as name:
        folder = Path(name)
        native, shared = folder / "native", folder / "shared"
        main_monitor, bulk = folder / "main", folder / "bulk"
        with qemu([main_monitor, bulk, native]), process(serve, main_monitor, bulk, shared):
            wait_for(shared)
            for row in rows(native, shared):
                print(f"{row.what:<66}{row.figure:>10}  {row.target}", flush=True)


if __name__ == "__main__":
    main()
