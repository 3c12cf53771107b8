# SPDX-License-Identifier: LGPL-2.1-or-later
"""Machines for tests, and what of a machine must be the same before and after."""

import asyncio
import contextlib
import os
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.conftest import make_raw
from vmspawn import Machine
from vmspawn.errors import NoSuchStorage
from vmspawn.host import runtime


def fresh_name() -> str:
    """A name that no other machine has."""
    return f"t{uuid.uuid4().hex[:10]}"


def idle_machine(qemu: str, folder: Path, **options: Any) -> Machine:
    """A machine whose guest is its firmware, looking for something to boot: for all that needs no guest."""
    image = make_raw(folder / f"boot-{fresh_name()}", 1 << 20)
    defaults = {"image": str(image), "qemu": qemu, "name": fresh_name(), "console": "headless", "ram": 64 << 20}
    return Machine(**{**defaults, **options})


@dataclass(frozen=True)
class Snapshot:
    """What a disk may leave behind."""

    nodes: frozenset[str]
    fdsets: tuple[int, ...]
    pci_devices: frozenset[str]
    ports_free: int
    qemu_files: int
    own_files: int

    @classmethod
    async def take(cls, machine: Machine) -> "Snapshot":
        """Look at QEMU through its monitor, and at both processes through /proc."""
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
    """What happens meanwhile must leave the machine as it was."""
    before = await Snapshot.take(machine)
    yield
    assert await Snapshot.take(machine) == before


# QEMU makes event descriptors and rings for its threads, once, when they are first needed.
_OF_THREADS = ("anon_inode:[event", "anon_inode:[io_uring")


def open_files(pid: int) -> int:
    """How many files a process has open, but for those of its threads."""
    return sum(not link.startswith(_OF_THREADS) for link in links_of(pid))


def links_of(pid: int) -> list[str]:
    """What the descriptors of a process are open on, as /proc names it; those that it closes meanwhile are left out."""
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
    """Whether nothing of a machine is left in the runtime directory."""
    return not os.path.exists(os.path.join(runtime.runtime_root(), name))


def process_is_gone(pid: int) -> bool:
    """Whether no such process runs."""
    return runtime.start_time(pid) == 0


async def event_named(machine: Machine, name: str, *, timeout: float = 30.0) -> dict[str, Any]:
    """Wait for the next event of that name and return its data."""
    async with asyncio.timeout(timeout):
        with machine.events() as events:
            async for event in events:
                if event.name == name:
                    return event.data or {}
    raise AssertionError(f"the machine ended before {name}")


async def detach_by_reset(machine: Machine, *names: str) -> None:
    """Detach disks of a guest that is its firmware. That lets go of no PCI device; a reset does, for what was asked
    before it. A firmware that was reset may reset itself once more, so that a disk may be gone sooner."""

    async def detach(name: str) -> None:
        with contextlib.suppress(NoSuchStorage):
            await machine.detach(name, timeout=60)

    waiting = [asyncio.create_task(detach(name)) for name in names]
    left = set(waiting)
    while left:
        await machine.reboot()
        _, left = await asyncio.wait(waiting, timeout=2)
    await asyncio.gather(*waiting)
