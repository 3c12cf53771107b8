# SPDX-License-Identifier: LGPL-2.1-or-later
"""Disks come and go all day beside many QMP clients, and the manager stays as it was."""

import asyncio
import contextlib
import os
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.commands import Spawned, spawned
from tests.conftest import make_raw
from tests.figures import figure, milliseconds
from tests.machines import open_files
from tests.qemu.qmp_fixtures import SCALE
from tests.shell import Shell
from vmspawn.control.client import Client
from vmspawn.host import runtime

#: 30 every day, 2,000 in `./dev soak`, 20,000 at a scale of 100.
CYCLES = 30 if SCALE <= 1 else round(200 * SCALE)

#: Cycles after which everything has been used once, and the manager is as it is to stay.
WARM = min(200, CYCLES // 2)

SESSIONS = 20
BUSES = ("virtio-blk", "nvme", "virtio-scsi")

#: How much larger the manager may be in the end.
GROWTH = 1.05

MACHINE = "io.vmspawn.Machine"


class State(NamedTuple):
    """What must not grow."""

    resident: int
    descriptors: int
    qemu_descriptors: int

    @classmethod
    def of(cls, manager: int, qemu: int) -> "State":
        pages = int(Path(f"/proc/{manager}/statm").read_text().split()[1])
        return cls(pages * os.sysconf("SC_PAGE_SIZE"), open_files(manager), open_files(qemu))


class Listeners:
    """QMP clients that read all that they are sent, and ask something now and then."""

    def __init__(self, machine: str) -> None:
        self._clients = [Client(machine) for _ in range(SESSIONS)]
        self._sockets = [client.upgrade(f"{MACHINE}.AcquireQMP")[0] for client in self._clients]
        for connected in self._sockets:
            connected.settimeout(None)
            connected.sendall(b'{"execute":"qmp_capabilities"}')
        self._threads = [threading.Thread(target=self._read, args=(each,)) for each in self._sockets]
        for thread in self._threads:
            thread.start()

    def _read(self, connected: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while connected.recv(1 << 16):
                pass

    def ask(self, number: int) -> None:
        self._sockets[number % SESSIONS].sendall(b'{"execute":"query-block","id":"soak"}')

    def close(self) -> None:
        for connected in self._sockets:
            with contextlib.suppress(OSError):
                connected.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for client in self._clients:
            client.close()


@contextlib.contextmanager
def listeners(machine: str) -> Iterator[Listeners]:
    opened = Listeners(machine)
    try:
        yield opened
    finally:
        opened.close()


@contextlib.asynccontextmanager
async def booted(qemu: str) -> AsyncIterator[Spawned]:
    """A guest that knows what to do with a disk; its console is left alone then."""
    with spawned(f"--qemu={qemu}", "--guest=builtin", "--console=headless") as machine:
        machine.wait_for("is running")
        shell = await Shell.connect(os.path.join(runtime.runtime_root(), machine.name, "console"))
        shell.close()
        yield machine


def cycle(client: Client, path: Path, bus: str) -> tuple[float, float]:
    """Attach and detach; the seconds that each took."""
    begun = time.monotonic()
    fd = os.open(path, os.O_RDWR)
    try:
        client.call(f"{MACHINE}.AttachStorage", {"fileDescriptorIndex": 0, "name": "soak", "bus": bus}, fds=(fd,))
    finally:
        os.close(fd)
    attached = time.monotonic()
    client.call(f"{MACHINE}.DetachStorage", {"name": "soak"})
    return attached - begun, time.monotonic() - attached


def run(machine: Spawned, path: Path) -> tuple[State, State]:
    times: list[tuple[float, float]] = []
    warm = None
    with Client(machine.name) as client, listeners(machine.name) as others:
        qemu = int(client.call(f"{MACHINE}.Describe")["processId"])
        for number in range(CYCLES):
            if number == WARM:
                warm = State.of(machine.process.pid, qemu)
            others.ask(number)
            times.append(cycle(client, path, BUSES[number % len(BUSES)]))
        end = State.of(machine.process.pid, qemu)
    assert warm is not None
    figure("attach/detach cycles over all buses, beside 20 sessions", CYCLES)
    for what, at in (("attach", 0), ("detach", 1)):
        first, last = ([each[at] for each in part] for part in (times[:WARM], times[-WARM:]))
        figure(f"{what}, first and last {WARM} cycles", f"{milliseconds(first)}, {milliseconds(last)}")
    figure(f"resident, after {WARM} cycles and in the end", f"{warm.resident >> 10} kB, {end.resident >> 10} kB")
    figure("descriptors, then and in the end", f"{warm.descriptors}, {end.descriptors}")
    return warm, end


@pytest.mark.scaled
async def test_the_manager_does_not_grow(qemu: str, tmp_path: Path) -> None:
    path = make_raw(tmp_path / "soak", 1 << 20)
    async with booted(qemu) as machine:
        warm, end = await asyncio.to_thread(run, machine, path)
    assert end.descriptors == warm.descriptors
    assert end.qemu_descriptors == warm.qemu_descriptors
    assert end.resident <= warm.resident * GROWTH
