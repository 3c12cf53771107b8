# SPDX-License-Identifier: LGPL-2.1-or-later
"""Provides machines for tests, and compares their resources to check that an operation left nothing behind."""

import asyncio
import contextlib
import os
import time
import uuid
from collections.abc import AsyncIterable, AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.conftest import make_raw
from vmspawn import Disk, MachineConfig
from vmspawn.api import machine as api
from vmspawn.boot.adopt import adopt
from vmspawn.console.hub import Console
from vmspawn.errors import NoSuchStorage
from vmspawn.host import runtime
from vmspawn.machine.recent_events import RecentEvents
from vmspawn.machine.running import Running, run
from vmspawn.qmp.monitor import Monitor
from vmspawn.qmp.share.multiplexer import Multiplexer
from vmspawn.qmp.share.session import Session
from vmspawn.storage.attach import Storage
from vmspawn.storage.attached_disk import AttachedDisk
from vmspawn.storage.backing import Backing


class Machine(api.Machine):
    """A `vmspawn.Machine` with access to its internal parts."""

    def __init__(self, config: MachineConfig | None = None, **options: Any) -> None:
        # Tests of the control socket serve it themselves.
        super().__init__(config, control=options.pop("control", False), **options)
        #: The messages of the adoption.
        self.adoption_notes: list[str] = []

    @classmethod
    async def adopt(cls, name: str) -> "Machine":
        """Adopt a machine that runs without a manager. Call `leave` or `close` afterwards."""
        started = adopt(MachineConfig(name=name, console="headless"))
        machine = cls(started.config)
        machine._current = api._Current(await run(started, notice=machine.adoption_notes.append))
        return machine

    async def leave(self) -> None:
        """Stop managing the machine, which continues to run."""
        await self.inner.leave()
        self._stop_serving()

    async def close(self) -> None:
        """End the machine."""
        self._stop_serving()
        await self.inner.end()

    @property
    def inner(self) -> Running:
        return self._running

    @property
    def monitor(self) -> Monitor:
        return self.inner.monitor

    @property
    def storage(self) -> Storage:
        return self.inner.storage

    @property
    def directory(self) -> runtime.MachineDirectory:  # type: ignore[override] # tests use the internal object
        return self.inner.directory

    @property
    def console(self) -> Console:  # type: ignore[override]
        return self.inner.console

    @property
    def sessions(self) -> tuple[Session, ...]:
        return self.inner.sessions

    @property
    def recent_events(self) -> RecentEvents:
        return self.inner.recent_events

    @property
    def running(self) -> bool:
        return self.inner.is_running

    @property
    def run_state(self) -> str:
        return self.inner.status

    async def multiplexer(self) -> Multiplexer:
        return await self.inner.multiplexer()

    def qmp(self, *, read_only: bool = False) -> contextlib.AbstractAsyncContextManager[Monitor]:
        return self.inner.qmp(read_only=read_only)

    def disk(self, name: str) -> AttachedDisk:
        """Return an attached disk."""
        return next(each for each in self.storage if each.name == name)

    async def sizes(self) -> dict[str, int]:
        """Return the size of each disk by name."""
        return {name: view.size for name, view in (await self.storage.views()).items()}

    async def attach_backing(self, disk: Disk, backing: Backing | None) -> AttachedDisk:
        return await self.storage.attach(disk, backing)

    async def replace_backing(self, name: str, backing: Backing, **options: Any) -> int:
        return await self.storage.changes.replace(name, backing, **options)


@contextlib.asynccontextmanager
async def adopted(name: str) -> AsyncIterator[Machine]:
    """Adopt a machine, and release it at the end."""
    machine = await Machine.adopt(name)
    try:
        yield machine
    finally:
        await machine.leave()


async def end_adopted(name: str) -> None:
    """Adopt a machine, and end it."""
    async with adopted(name) as machine:
        await machine.terminate()
        await machine.wait()


def fresh_name() -> str:
    """Return a unique name for a machine."""
    return f"t{uuid.uuid4().hex[:10]}"


def idle_machine(qemu: str, folder: Path, **options: Any) -> Machine:
    """Return a machine that stays in its firmware, for tests that need no guest."""
    image = make_raw(folder / f"boot-{fresh_name()}", 1 << 20)
    defaults = {"image": str(image), "qemu": qemu, "name": fresh_name(), "console": "headless", "ram": 64 << 20}
    return Machine(**{**defaults, **options})


@dataclass(frozen=True)
class Resources:
    """The resources of a machine that a disk may leave in use."""

    nodes: frozenset[str]
    fdsets: tuple[int, ...]
    pci_devices: frozenset[str]
    ports_free: int
    qemu_files: int
    own_files: int

    @classmethod
    async def of(cls, machine: Machine) -> "Resources":
        """Ask QEMU through its monitor, and count the open files of QEMU and of this process in /proc."""
        nodes = await machine.monitor.execute("query-named-block-nodes", {"flat": True})
        fdsets = await machine.monitor.execute("query-fdsets")
        pci = await machine.monitor.execute("query-pci")
        return cls(
            frozenset(node["node-name"] for node in nodes),
            tuple(sorted(fdset["fdset-id"] for fdset in fdsets)),
            frozenset(_qdev_ids(pci)),
            machine.storage.ports_free,
            open_files(machine.pid),
            open_files(os.getpid()),
        )


@contextlib.asynccontextmanager
async def unchanged(machine: Machine) -> AsyncIterator[None]:
    """Check that the block leaves nothing behind in the machine."""
    before = await Resources.of(machine)
    yield
    after = await Resources.of(machine)
    assert after == before, f"{after} differs from {before}"


# QEMU creates event descriptors and rings for its threads on their first use.
_OF_THREADS = ("anon_inode:[event", "anon_inode:[io_uring")


def open_files(pid: int) -> int:
    """Return the number of a process's open files, except those of its threads."""
    return sum(not link.startswith(_OF_THREADS) for link in links_of(pid))


def links_of(pid: int) -> list[str]:
    """Return the targets of a process's descriptors from /proc, without descriptors that are closed meanwhile."""
    links = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            links.append(os.readlink(entry))
    return links


def _qdev_ids(found: Any) -> list[str]:
    ids: list[str] = []
    for bus in found:
        for device in bus["devices"]:
            ids.append(device["qdev_id"] or f"{device['bus']}:{device['slot']}.{device['function']}")
            if bridge := device.get("pci_bridge"):
                ids += _qdev_ids([{"devices": bridge.get("devices", [])}])
    return ids


def is_gone(name: str) -> bool:
    """Return whether a machine has no runtime directory."""
    return not os.path.exists(os.path.join(runtime.runtime_root(), name))


def process_is_gone(pid: int) -> bool:
    """Return whether no process has the id."""
    return runtime.start_time(pid) == 0


def processes_of(name: str) -> list[str]:
    """Return the processes that name a machine's directory (its watcher), or that write to its log (QEMU)."""
    folder = os.path.join(os.path.realpath(runtime.runtime_root()), name)
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            if os.readlink(f"/proc/{pid}/fd/2").startswith(folder) or folder.encode() in Path(
                f"/proc/{pid}/cmdline"
            ).read_bytes().split(b"\0"):
                found.append(pid)
        except OSError:
            continue
    return found


def wait_until_nothing_left(name: str) -> None:
    """Wait until a machine has no process and no directory."""
    deadline = time.monotonic() + 60
    while processes_of(name) or not is_gone(name):
        assert time.monotonic() < deadline, f"left: {processes_of(name)}, directory gone: {is_gone(name)}"
        time.sleep(0.05)


async def event_named(machine: Machine, name: str, *, timeout: float = 30.0) -> dict[str, Any]:
    """Wait for the next event with a name, and return its data."""
    with machine.events() as events:
        return await next_event(events, name, timeout=timeout)


async def next_event(events: AsyncIterable[Any], name: str, *, timeout: float = 30.0) -> dict[str, Any]:
    """Read events up to the next one with a name, and return its data."""
    try:
        async with asyncio.timeout(timeout):
            async for event in events:
                if event.name == name:
                    return event.data or {}
    except TimeoutError:
        raise AssertionError(f"{name} did not come within {timeout:g} s") from None
    raise AssertionError(f"the machine ended before {name}")


async def detach_by_reset(machine: Machine, *names: str) -> None:
    """Detach disks of a machine in its firmware, which releases PCI devices only at a reset after the request.

    After a reset, the firmware may reset itself once more. That also removes disks whose removal is pending, so a disk
    may be gone already.
    """

    async def detach(name: str) -> None:
        with contextlib.suppress(NoSuchStorage):
            await machine.detach(name, timeout=60)

    waiting = [asyncio.create_task(detach(name)) for name in names]
    left = set(waiting)
    while left:
        await machine.reboot()
        _, left = await asyncio.wait(waiting, timeout=2)
    await asyncio.gather(*waiting)
