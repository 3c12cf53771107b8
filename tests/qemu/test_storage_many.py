# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests as many disks on one machine as its buses can have, and one more."""

import asyncio
import contextlib
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.conftest import MIB, make_raw
from tests.machines import Machine, Resources, idle_machine
from tests.qemu.qmp_fixtures import scaled
from vmspawn import Disk
from vmspawn.boot.qemu import find_qemu
from vmspawn.errors import NoFreePort
from vmspawn.hotplug.places import NamespacePlace, Place, ScsiPlace

#: A virtio-scsi target id is one byte. QEMU limits the namespaces of an NVMe controller to the same number.
PLACES = 256


@pytest.mark.slow
@pytest.mark.parametrize("bus", ["virtio-scsi", "nvme-ns"])
async def test_a_controller_has_256_disks_and_no_more(qemu: str, tmp_path: Path, bus: str) -> None:
    if bus == "nvme-ns" and not find_qemu(qemu).has_namespaces:
        pytest.skip("this QEMU plugs no NVMe namespaces in while the machine runs")
    names = [f"disk{number}" for number in range(PLACES)]
    for name in (*names, "one-more"):
        make_raw(tmp_path / name, MIB)
    # Firmware does not release the controller of namespaces, so a boot disk keeps the controller in use.
    at_boot = [Disk(str(tmp_path / names.pop()), bus=bus)] if bus == "nvme-ns" else []
    async with idle_machine(qemu, tmp_path, extra_disks=tuple(at_boot)) as machine:
        before = await Resources.of(machine)
        await attach_all(machine, tmp_path, names, bus)
        assert len(addresses(machine)) + len(at_boot) == PLACES
        with pytest.raises(NoFreePort, match="all 256 are in use") as caught:
            await machine.attach(Disk(str(tmp_path / "one-more"), bus=bus))
        assert caught.value.hint == "detach a disk first"
        await use_places_again(machine, tmp_path, names, bus)
        await asyncio.gather(*(machine.detach(name) for name in names))
        assert addresses(machine) == set()
        assert await Resources.of(machine) == before


async def attach_all(machine: Machine, folder: Path, names: list[str], bus: str) -> None:
    """Attach all disks at once, as many clients would."""
    await asyncio.gather(*(machine.attach(Disk(str(folder / name), bus=bus)) for name in names))


async def use_places_again(machine: Machine, folder: Path, names: list[str], bus: str) -> None:
    """Detach disks in the middle; the next disks get their places."""
    leaving = names[10:250:24]
    freed = {place(machine, name) for name in leaving}
    for name in leaving:
        await machine.detach(name)
    assert len(addresses(machine)) == len(names) - len(leaving)
    await attach_all(machine, folder, leaving, bus)
    assert {place(machine, name) for name in leaving} == freed


def place(machine: Machine, name: str) -> Place:
    """Return a disk's place."""
    return next(each.place for each in machine.storage if each.name == name)


def addresses(machine: Machine) -> set[int]:
    """Return the targets or namespaces of all disks except the boot disk."""
    return {_address(each.place) for each in machine.storage if not each.is_boot}


def _address(found: Place) -> int:
    match found:
        case ScsiPlace():
            return found.target
        case NamespacePlace():
            return found.nsid
    raise AssertionError(f"{found} is on PCI")


@pytest.mark.slow
@pytest.mark.scaled
async def test_many_machines_in_one_process_do_not_affect_each_other(qemu: str, tmp_path: Path) -> None:
    """Disks with the same names are attached and detached on all machines at once; each machine ends as it began."""
    async with contextlib.AsyncExitStack() as stack:
        starting = (stack.enter_async_context(idle_machine(qemu, tmp_path)) for _ in range(min(20, scaled(4))))
        machines = await asyncio.gather(*starting)
        before = [await MachineResources.of(machine) for machine in machines]
        await asyncio.gather(*(attach_and_detach(machine, tmp_path) for machine in machines))
        assert [await MachineResources.of(machine) for machine in machines] == before


class MachineResources(NamedTuple):
    """The part of `Resources` that belongs to one machine."""

    nodes: frozenset[str]
    fdsets: tuple[int, ...]
    qemu_files: int

    @classmethod
    async def of(cls, machine: Machine) -> "MachineResources":
        """Ask QEMU, and count its open files."""
        found = await Resources.of(machine)
        return cls(found.nodes, found.fdsets, found.qemu_files)


async def attach_and_detach(machine: Machine, folder: Path) -> None:
    """Attach and detach eight disks, twice."""
    names = [f"disk{number}" for number in range(8)]
    for name in names:
        make_raw(folder / f"{machine.name}-{name}", MIB)
    for _ in range(2):
        disks = [Disk(str(folder / f"{machine.name}-{name}"), name, "virtio-scsi") for name in names]
        await asyncio.gather(*(machine.attach(disk) for disk in disks))
        assert {each.name for each in machine.storage if not each.is_boot} == set(names)
        await asyncio.gather(*(machine.detach(name) for name in names))
