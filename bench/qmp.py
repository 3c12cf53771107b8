# SPDX-License-Identifier: LGPL-2.1-or-later
"""A QMP session beside a monitor of one's own: round trips, throughput, fan-out, and bad neighbours.

One QEMU of `-machine none` serves a native monitor and, through a multiplexer in a process of its own, the sessions.
Both are asked in turn in one run, so that the ratio holds when the machine's speed drifts. Ratios are session ÷ native.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import multiprocessing
import os
import socket
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

QEMU = os.environ.get("QEMU", "qemu-system-x86_64")
ROUNDS = 1500
BLOCK = 50
NEGOTIATE = b'{"execute":"qmp_capabilities"}'
SPACED = json.dumps({"execute": "query-status", "id": "__qmp#00001"}).encode()
MINIMAL = b'{"execute":"query-status"}'
SCHEMA = json.dumps({"execute": "query-qmp-schema", "id": "__qmp#00001"}).encode()


class Client:
    """A blocking QMP client that does as little as it can."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(60)
        self.socket.connect(str(path))
        self._buffer = b""
        self.line()
        self.ask(NEGOTIATE)

    def line(self) -> bytes:
        while b"\n" not in self._buffer:
            data = self.socket.recv(1 << 18)
            if not data:
                raise SystemExit("a connection ended")
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def ask(self, command: bytes) -> float:
        """Seconds for one round trip."""
        start = time.perf_counter()
        self.socket.sendall(command)
        while b'"event"' in self.line()[:60]:
            pass
        return time.perf_counter() - start

    def pipeline(self, command: bytes, count: int) -> None:
        """Send `count` commands without waiting, then read as many replies."""
        self.socket.sendall(command * count)
        for _ in range(count):
            self.line()


def serve(main: Path, bulk: Path, listen: Path) -> None:
    """The manager's side: a multiplexer that serves whoever connects."""
    from vmspawn.qmp.multiplexer import Multiplexer

    async def run() -> None:
        monitors = []
        for path in (main, bulk):
            monitors.append(socket.socket(socket.AF_UNIX))
            monitors[-1].connect(str(path))
        multiplexer = Multiplexer(*monitors, on_lost=lambda why: os._exit(0))
        await multiplexer.start()
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(listen) + ".new")
        listener.listen(512)
        listener.setblocking(False)
        os.rename(str(listen) + ".new", listen)
        loop = asyncio.get_running_loop()
        loop.add_reader(listener, lambda: multiplexer.open(listener.accept()[0]))
        await asyncio.Event().wait()

    asyncio.run(run())


def interleaved(first: Callable[[], float], second: Callable[[], float], rounds: int) -> tuple[float, float]:
    """The medians of two measurements that take turns, block by block."""
    figures: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds // BLOCK):
        for measure, found in zip((first, second), figures, strict=True):
            measure()
            found.extend(measure() for _ in range(BLOCK))
    return statistics.median(figures[0]), statistics.median(figures[1])


def round_trips(native: Path, shared: Path, command: bytes, rounds: int) -> tuple[float, float]:
    """p50 through a session and natively."""
    session, own = Client(shared), Client(native)
    found = interleaved(lambda: session.ask(command), lambda: own.ask(command), rounds)
    session.socket.close()
    own.socket.close()
    return found


def qemu_qmp(native: Path, shared: Path) -> tuple[float, float]:
    """p50 of qemu.qmp's own client."""
    from qemu.qmp import QMPClient

    async def run() -> tuple[float, float]:
        clients = []
        for path in (shared, native):
            clients.append(QMPClient("bench"))
            await clients[-1].connect(str(path))
        figures: tuple[list[float], list[float]] = ([], [])
        for _ in range(ROUNDS // BLOCK):
            for client, found in zip(clients, figures, strict=True):
                await client.execute("query-status")
                for _ in range(BLOCK):
                    start = time.perf_counter()
                    await client.execute("query-status")
                    found.append(time.perf_counter() - start)
        for client in clients:
            await client.disconnect()
        return statistics.median(figures[0]), statistics.median(figures[1])

    return asyncio.run(run())


def throughput(path: Path, command: bytes, clients: int, total: int) -> float:
    """Commands a second of so many pipelining clients together."""
    made = [Client(path) for _ in range(clients)]
    count = total // clients
    start = time.perf_counter()
    for client in made:
        client.socket.sendall(command * count)
    for client in made:
        for _ in range(count):
            client.line()
    took = time.perf_counter() - start
    for client in made:
        client.socket.close()
    return count * clients / took


def aggregate(native: Path, shared: Path, command: bytes, clients: int) -> float:
    """Throughput of sessions ÷ that of one native monitor, the median of five turns."""
    ratios = []
    for _ in range(5):
        sessions = throughput(shared, command, clients, 1280)
        ratios.append(sessions / throughput(native, command, 1, 1280))
    return statistics.median(ratios)


def fan_out(shared: Path, count: int) -> float:
    """Seconds until STOP has reached so many sessions, from the sending of `stop`; the median of five."""
    sessions = [Client(shared) for _ in range(count)]
    actor = Client(shared)
    # A machine that never ran knows no STOP.
    actor.socket.sendall(b'{"execute":"cont"}')
    for session in (*sessions, actor, actor):
        session.line()
    figures = []
    for _ in range(5):
        start = time.perf_counter()
        actor.socket.sendall(b'{"execute":"stop"}')
        for session in sessions:
            session.line()
        figures.append(time.perf_counter() - start)
        for _ in ("the event", "the reply"):
            actor.line()
        actor.socket.sendall(b'{"execute":"cont"}')
        for session in (*sessions, actor, actor):
            session.line()
    for session in (*sessions, actor):
        session.socket.close()
    return statistics.median(figures)


def neighbours(shared: Path) -> float:
    """p50 beside one session that floods, one that stalls and one that sends 1 MB ÷ p50 in the quiet."""
    honest, flood, stalled, large = (Client(shared) for _ in range(4))
    quiet = statistics.median(honest.ask(SPACED) for _ in range(400))
    stalled.socket.sendall(b'{"execute":"query-qmp-schema"}' * 20)
    padding = "x" * (1 << 20)
    message = {"execute": "qom-get", "arguments": {"path": "/", "property": padding}}
    large.socket.setblocking(False)
    flood.socket.setblocking(False)
    data, loud = json.dumps(message).encode(), []
    for _ in range(400):
        with contextlib.suppress(BlockingIOError):
            data = data[large.socket.send(data) :] if data else data
        with contextlib.suppress(BlockingIOError):
            flood.socket.send(SPACED * 20)
            flood.socket.recv(1 << 20)
        loud.append(honest.ask(SPACED))
    for client in (honest, flood, stalled, large):
        client.socket.close()
    return statistics.median(loud) / quiet


def start_qemu(folder: Path, machine: str) -> tuple[subprocess.Popen[bytes], list[Path]]:
    """A QEMU with three monitors on listening sockets."""
    paths = [folder / f"{machine}-{number}" for number in range(3)]
    help_text = subprocess.run([QEMU, "-object", "help"], capture_output=True, check=True, text=True).stdout
    command = [QEMU, "-machine", machine, "-accel", "tcg", "-nodefaults", "-display", "none", "-S"]
    listeners = []
    for number, path in enumerate(paths):
        listeners.append(socket.socket(socket.AF_UNIX))
        listeners[-1].bind(str(path))
        listeners[-1].listen(4)
        command += ["-chardev", f"socket,id=c{number},fd={listeners[-1].fileno()},server=on,wait=off"]
        if "monitor-qmp" in help_text:
            command += ["-object", f"monitor-qmp,id=m{number},chardev=c{number}"]
        else:
            command += ["-mon", f"chardev=c{number},mode=control"]
    process = subprocess.Popen(command, pass_fds=[each.fileno() for each in listeners])
    for listener in listeners:
        listener.close()
    return process, paths


def measure(folder: Path) -> list[tuple[str, str, str]]:
    """All rows: what, figure, target."""
    process, paths = start_qemu(folder, "none")
    native, shared = paths[2], folder / "shared"
    server = multiprocessing.get_context("spawn").Process(target=serve, args=(paths[0], paths[1], shared))
    server.start()
    deadline = time.monotonic() + 30
    while not shared.exists():
        if time.monotonic() > deadline:
            raise SystemExit("the multiplexer did not come up")
    rows = []
    try:
        for name, command, rounds, target in (
            ("query-status, spaced JSON", SPACED, ROUNDS, "0.85"),
            ("query-status, minimal JSON", MINIMAL, ROUNDS, "1.10"),
            ("query-qmp-schema", SCHEMA, 300, "1.05"),
        ):
            session, own = round_trips(native, shared, command, rounds)
            rows.append(
                (f"{name}: p50 {session * 1e6:.0f} / {own * 1e6:.0f} us", f"{session / own:.2f}", f"≤ {target}")
            )
        session, own = qemu_qmp(native, shared)
        row = f"query-status, qemu.qmp: p50 {session * 1e6:.0f} / {own * 1e6:.0f} us"
        rows.append((row, f"{session / own:.2f}", "≤ 0.90"))
        for clients in (8, 32):
            for name, command, target in (("spaced", SPACED, "1.20"), ("minimal", MINIMAL, "0.90")):
                figure = aggregate(native, shared, command, clients)
                rows.append((f"{clients} pipelining sessions ÷ one monitor, {name}", f"{figure:.2f}", f"≥ {target}"))
        rows.append(("STOP to 256 sessions", f"{fan_out(shared, 256) * 1000:.1f} ms", "≤ 10 ms"))
        rows.append(("p50 beside a flood, a stall and 1 MB ÷ quiet", f"{neighbours(shared):.2f}", "≤ 3.00"))
    finally:
        process.kill()
        process.wait()
        server.join(10)
        server.kill()
    return rows


def main() -> None:
    """Measure and print."""
    with tempfile.TemporaryDirectory(prefix="vmspawn-bench-") as folder:
        rows = measure(Path(folder))
    print("QMP through a session beside a monitor of one's own; session ÷ native.\n")
    for name, figure, target in rows:
        print(f"{name:<58} {figure:>8}  {target}")


if __name__ == "__main__":
    main()
