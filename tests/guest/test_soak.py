# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests that the manager neither grows nor slows down over many attach and detach cycles beside many QMP clients."""

import asyncio
import contextlib
import os
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from statistics import median
from typing import NamedTuple

import pytest

from tests.commands import Spawned, spawned
from tests.conftest import make_raw
from tests.figures import figure
from tests.machines import open_files
from tests.qemu.qmp_fixtures import SCALE
from tests.shell import Shell
from vmspawn.control.client import Client
from vmspawn.host import runtime

#: The number of cycles: 30 by default, 2,000 in `./dev soak`, 20,000 at a scale of 100.
CYCLES = 30 if SCALE <= 1 else round(200 * SCALE)

#: The number of cycles after which every code path has run, so that the manager must not grow any more.
WARM = min(200, CYCLES // 2)

SESSIONS = 20
BUSES = ("virtio-blk", "nvme", "virtio-scsi")

#: The factor by which the manager may be larger or slower at the end.
GROWTH = 1.05

#: Whether times are compared, which takes a second machine and minutes.
TIMED = SCALE >= 10

#: Cycles of each machine for one comparison. The ratio of a pair varies by 25 %, the median of 300 pairs by 2 %.
PAIRS = 300

#: The maximum number of comparisons at the end. A manager that seems slower is compared again: noise disappears, growth
#: does not.
COMPARISONS = 5

MACHINE = "io.vmspawn.Machine"


class State(NamedTuple):
    """The quantities that must not grow."""

    resident: int
    descriptors: int
    qemu_descriptors: int

    @classmethod
    def of(cls, manager: int, qemu: int) -> "State":
        pages = int(Path(f"/proc/{manager}/statm").read_text().split()[1])
        return cls(pages * os.sysconf("SC_PAGE_SIZE"), open_files(manager), open_files(qemu))


class Listeners:
    """QMP clients that read all events, and sometimes send a command."""

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
    """Boot a guest, which handles disks, and disconnect from its console once it is up."""
    with spawned(f"--qemu={qemu}", "--guest=builtin", "--console=headless") as machine:
        machine.wait_for("is running")
        shell = await Shell.connect(os.path.join(runtime.runtime_root(), machine.name, "console"))
        shell.close()
        yield machine


class Times(NamedTuple):
    """The times of a cycle in seconds, or their ratios to another cycle's."""

    attach: float
    detach: float
    #: The manager's processor time.
    cpu: float

    def over(self, other: "Times") -> "Times":
        return Times(*(mine / its for mine, its in zip(self, other, strict=True)))


class Subject:
    """A machine whose disks are attached and detached, with connected sessions."""

    def __init__(self, machine: Spawned, client: Client, others: Listeners, path: Path) -> None:
        self._client = client
        self._others = others
        self._path = path
        self._manager = machine.process.pid
        self._qemu = int(client.call(f"{MACHINE}.Describe")["processId"])

    def state(self) -> State:
        return State.of(self._manager, self._qemu)

    def run(self, cycles: int) -> None:
        for number in range(cycles):
            self.cycle(number)

    def cycle(self, number: int) -> Times:
        """Attach and detach a disk, on the next bus each time."""
        wanted = {"fileDescriptorIndex": 0, "name": "soak", "bus": BUSES[number % len(BUSES)]}
        self._others.ask(number)
        cpu, begun = self._cpu(), time.monotonic()
        fd = os.open(self._path, os.O_RDWR)
        try:
            self._client.call(f"{MACHINE}.AttachStorage", wanted, fds=(fd,))
        finally:
            os.close(fd)
        attached = time.monotonic()
        self._client.call(f"{MACHINE}.DetachStorage", {"name": "soak"})
        return Times(attached - begun, time.monotonic() - attached, self._cpu() - cpu)

    def _cpu(self) -> float:
        # The clock of another process, computed as clock_getcpuclockid(3) does.
        return time.clock_gettime((~self._manager << 3) | 2)


@contextlib.contextmanager
def subject(machine: Spawned, folder: Path) -> Iterator[Subject]:
    with Client(machine.name) as client, listeners(machine.name) as others:
        yield Subject(machine, client, others, make_raw(folder / machine.name, 1 << 20))


def compare(one: Subject, other: Subject) -> Times:
    """Return the ratio of the times of two machines: the median over pairs of cycles on the same bus."""
    pairs = []
    for number in range(PAIRS):
        order = (one, other) if number % 2 else (other, one)
        times = {each: each.cycle(number) for each in order}
        pairs.append(times[one].over(times[other]))
    return Times(*(median(ratios) for ratios in zip(*pairs, strict=True)))


def judge(aged: Subject, young: Subject, before: Times) -> Times:
    """Return the slowdown of a machine relative to a fresh machine: the smallest of several comparisons."""
    slower = Times(*[float("inf")] * 3)
    for _ in range(COMPARISONS):
        found = compare(aged, young).over(before)
        slower = Times(*(min(pair) for pair in zip(slower, found, strict=True)))
        if max(slower) <= GROWTH:
            break
    for what, value in zip(("attach: time", "detach: time", "manager's processor time"), slower, strict=True):
        figure(f"{what} at the end, relative to {WARM} cycles", f"{value:.3f}")
    return slower


def run(machines: list[Spawned], folder: Path) -> tuple[State, State, Times | None]:
    """Return the first machine's state after `WARM` cycles and after all cycles, and its slowdown."""
    with contextlib.ExitStack() as stack:
        aged, *spared = [stack.enter_context(subject(machine, folder)) for machine in machines]
        for each in (aged, *spared):
            each.run(WARM)
        warm = aged.state()
        before = [compare(aged, young) for young in spared]
        aged.run(CYCLES - WARM)
        end = aged.state()
        figure("attach/detach cycles over all buses, beside 20 sessions", CYCLES)
        figure(
            f"manager's resident memory after {WARM} cycles and at the end",
            f"{warm.resident >> 10} kB, {end.resident >> 10} kB",
        )
        figure("manager's file descriptors, then and at the end", f"{warm.descriptors}, {end.descriptors}")
        return warm, end, judge(aged, spared[0], before[0]) if spared else None


@pytest.mark.soak
async def test_the_manager_neither_grows_nor_slows_down(qemu: str, tmp_path: Path) -> None:
    """The slowdown is relative to a fresh machine on the same busy host."""
    async with contextlib.AsyncExitStack() as stack:
        machines = [await stack.enter_async_context(booted(qemu)) for _ in range(2 if TIMED else 1)]
        warm, end, slower = await asyncio.to_thread(run, machines, tmp_path)
    assert end.descriptors == warm.descriptors
    assert end.qemu_descriptors == warm.qemu_descriptors
    assert end.resident <= warm.resident * GROWTH
    assert slower is None or max(slower) <= GROWTH, slower
