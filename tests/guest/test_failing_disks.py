# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests disks that fail while a guest uses them: I/O errors, a full host, a truncated image."""

import asyncio
import os
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tests.commands import vmctl
from tests.conftest import MIB, make_raw
from tests.machines import Machine, fresh_name
from tests.shell import Shell
from tests.small_disks import mounted
from vmspawn import Disk
from vmspawn.control.server import ControlServer, build_registry
from vmspawn.errors import BadConfig
from vmspawn.inside.inside import Inside
from vmspawn.machine.ending import MachineEvents
from vmspawn.storage import nodes
from vmspawn.storage.attached_disk import AttachedDisk
from vmspawn.storage.failures import FAILED_EVENT

pytestmark = pytest.mark.asyncio(loop_scope="module")

DEADLINE = 60.0


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def guest(qemu: str) -> AsyncIterator[tuple[Machine, Shell]]:
    async with Machine(guest="builtin", warm=True, qemu=qemu, name=fresh_name(), console="headless") as machine:
        server = ControlServer(machine.directory, build_registry(machine.inner, Inside(machine.inner)))
        shell = await Shell.open(machine)
        yield machine, shell
        shell.close()
        server.close()


async def wait_for(events: MachineEvents, name: str) -> dict[str, Any]:
    async with asyncio.timeout(DEADLINE):
        async for event in events:
            if event.name == name:
                return event.data or {}
    raise AssertionError(f"the machine ended before {name}")


async def attached(guest: tuple[Machine, Shell], disk: Disk) -> tuple[AttachedDisk, str]:
    """Attach a disk, and wait until the guest has the device."""
    machine, shell = guest
    attachment = machine.disk((await machine.attach(disk)).name)
    await shell.run(f"until [ -b {attachment.by_id} ]; do usleep 10000; done")
    return attachment, attachment.by_id


async def break_writes(machine: Machine, attachment: AttachedDisk) -> None:
    """Insert a node that fails every write, below the disk's pivot node."""
    image = attachment.images[0]
    options = {
        "driver": "blkdebug",
        "node-name": "broken",
        "image": image.top_node,
        "inject-error": [{"event": "none", "iotype": "write", "errno": 5, "once": False}],
    }
    await machine.monitor.execute("blockdev-add", options)
    await put_pivot_on(machine, attachment, "broken")


async def put_pivot_on(machine: Machine, attachment: AttachedDisk, node: str) -> None:
    """Make a node the child of the disk's pivot node."""
    options = nodes.pivot_node(attachment.identifiers, attachment.images[0], attachment.disk, read_only=False)
    await machine.monitor.execute("blockdev-reopen", {"options": [{**options, "file": node}]})


async def repair_writes(machine: Machine, attachment: AttachedDisk) -> None:
    await put_pivot_on(machine, attachment, attachment.images[0].top_node)
    await machine.monitor.execute("blockdev-del", {"node-name": "broken"})


def write(device: str, *, at: int = 0, mib: int = 1) -> str:
    return f"dd if=/dev/zero of={device} bs=1M count={mib} seek={at} conv=fsync,notrunc 2>/dev/null"


@pytest.mark.parametrize("bus", ["virtio-blk", "virtio-scsi"])
async def test_an_error_is_reported_with_the_disks_name(guest: tuple[Machine, Shell], tmp_path: Path, bus: str) -> None:
    machine, shell = guest
    disk = Disk(str(make_raw(tmp_path / "disk")), bus=bus, on_error="report")
    attachment, device = await attached(guest, disk)
    await break_writes(machine, attachment)
    with machine.events() as events:
        await shell.run(f"! {write(device)}")
        data = await wait_for(events, FAILED_EVENT)
    assert data["name"] == "disk"
    assert (data["operation"], data["action"], data["no_space"]) == ("write", "report", False)
    assert machine.running
    assert attachment.failures > 0
    assert attachment.last_failure == "write: Input/output error"
    await repair_writes(machine, attachment)
    await shell.run(write(device))
    await machine.detach("disk")


@pytest.mark.parametrize("bus", ["virtio-blk", "virtio-scsi"])
async def test_a_stopped_guest_continues_once_it_is_resumed(
    guest: tuple[Machine, Shell], tmp_path: Path, bus: str
) -> None:
    """The request then succeeds, and the guest never sees the error."""
    machine, shell = guest
    disk = Disk(str(make_raw(tmp_path / "disk")), bus=bus, on_error="stop")
    attachment, device = await attached(guest, disk)
    await break_writes(machine, attachment)
    with machine.events() as events:
        writing = asyncio.create_task(shell.run(write(device)))
        data = await wait_for(events, FAILED_EVENT)
        await wait_for(events, "STOP")
    assert data["action"] == "stop"
    assert machine.run_state == "io-error"
    await repair_writes(machine, attachment)
    await machine.resume()
    await writing
    assert machine.running
    await machine.detach("disk")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of 8 MiB. `grow` enlarges it."""
    with mounted(tmp_path / "small", 8 * MIB, is_lazy=True) as folder:
        yield folder


def grow(folder: Path) -> None:
    subprocess.run(["mount", "-o", "remount,size=64M", str(folder)], check=True)


@pytest.mark.parametrize("bus", ["virtio-blk", "virtio-scsi"])
async def test_a_full_host_stops_the_guest_until_there_is_room(
    guest: tuple[Machine, Shell], small_disk: Path, bus: str
) -> None:
    machine, shell = guest
    attachment, device = await attached(guest, Disk(str(make_raw(small_disk / "disk", 32 * MIB)), bus=bus))
    with machine.events() as events:
        writing = asyncio.create_task(shell.run(write(device, mib=16)))
        data = await wait_for(events, FAILED_EVENT)
        await wait_for(events, "STOP")
    assert (data["name"], data["no_space"], data["action"]) == ("disk", True, "stop")
    assert machine.run_state == "io-error"
    assert attachment.last_failure == "write: no space left on the host (the guest was stopped)"
    await asyncio.to_thread(grow, small_disk)
    done = await asyncio.to_thread(vmctl, "resume", machine.name)
    assert (done.returncode, done.stderr) == (0, "")
    await writing
    assert os.stat(small_disk / "disk").st_blocks * 512 >= 16 * MIB
    await machine.detach("disk")


@pytest.mark.parametrize("bus", ["virtio-blk", "nvme", "virtio-scsi"])
async def test_the_machine_continues_when_an_image_is_truncated(
    guest: tuple[Machine, Shell], tmp_path: Path, bus: str
) -> None:
    """Reads beyond the end fail or return zeroes, depending on QEMU's version; the machine and the disk continue."""
    machine, shell = guest
    path = make_raw(tmp_path / "disk", 32 * MIB)
    _, device = await attached(guest, Disk(str(path), bus=bus))
    os.truncate(path, 4 * MIB)
    await shell.run(f"dd if={device} of=/dev/null bs=1M skip=16 count=1 2>/dev/null || :")
    await shell.run(write(device))
    assert machine.running
    await machine.detach("disk")
    assert [each.name for each in machine.storage] == []


async def test_nvme_disks_can_only_report_errors_to_the_guest(guest: tuple[Machine, Shell], tmp_path: Path) -> None:
    machine, _ = guest
    path = str(make_raw(tmp_path / "disk"))
    for on_error in ("stop", "enospc"):
        with pytest.raises(BadConfig, match="always reports errors to the guest"):
            await machine.attach(Disk(path, bus="nvme", on_error=on_error))
    with pytest.raises(BadConfig, match="unknown reaction to errors"):
        await machine.attach(Disk(path, on_error="ignore"))
    await machine.attach(Disk(path, bus="nvme", on_error="report"))
    await machine.detach("disk")


async def test_an_adoption_reports_which_disk_stopped_the_guest(qemu: str, tmp_path: Path) -> None:
    """Only the previous manager received the event."""
    machine = Machine(guest="builtin", warm=True, qemu=qemu, name=fresh_name(), console="headless")
    await machine.__aenter__()
    try:
        shell = await Shell.open(machine)
        await machine.attach(Disk(str(make_raw(tmp_path / "fine")), bus="virtio-scsi"))
        attachment, device = await attached((machine, shell), Disk(str(make_raw(tmp_path / "disk")), on_error="stop"))
        await break_writes(machine, attachment)
        with machine.events() as events:
            await shell.run(f"{write(device)} & true")
            await wait_for(events, "STOP")
        shell.close()
    finally:
        await machine.leave()
    adopted = await Machine.adopt(machine.name)
    try:
        assert adopted.run_state == "io-error"
        assert adopted.disk("disk").last_failure == "a request failed (the guest was stopped)"
        assert adopted.disk("fine").last_failure == ""
    finally:
        await adopted.close()
