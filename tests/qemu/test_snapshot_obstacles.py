# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests that a save names everything that it cannot save, with a hint, before it pauses the guest."""

import os
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import make_raw
from tests.copies import inner, snapshot_paths
from tests.machines import Machine, idle_machine
from vmspawn import Disk
from vmspawn.boot.shares import Share
from vmspawn.errors import SnapshotBlocked, StartError, StoragePending
from vmspawn.helpers import virtiofsd


async def check_refused(machine: Machine, *reasons: str, hint: str = "") -> None:
    """Check that a save is refused for these reasons, and that the guest was not paused."""
    before = snapshot_paths()
    with machine.monitor.events() as events:
        with pytest.raises(SnapshotBlocked) as caught:
            await machine.snapshot()
        events.close()
        assert not [event.name async for event in events if event.name in ("STOP", "RESUME", "MIGRATION")]
    for reason in reasons:
        assert reason in str(caught.value)
    assert hint in caught.value.hint
    assert snapshot_paths() == before


async def test_obstacles_that_clients_make_are_named(qemu: str, tmp_path: Path) -> None:
    async with idle_machine(qemu, tmp_path) as machine:
        await machine.attach(Disk(str(make_raw(tmp_path / "disk")), bus="virtio-scsi"))
        async with machine.qmp() as qmp:
            await check_job(machine, qmp)
            await check_export(machine, qmp, machine.disk("disk").images[0].top_node, tmp_path / "nbd")
        assert (await machine.snapshot()).size > 0
        # The guest, which is only a firmware, does not release a PCI device.
        await machine.attach(Disk(str(make_raw(tmp_path / "going")), bus="virtio-blk"))
        with pytest.raises(StoragePending):
            await machine.detach("going", timeout=0)
        await check_refused(machine, "disk going is detaching", hint=f"vmctl detach-disk {machine.name} going")


async def check_job(machine: Machine, qmp: Any) -> None:
    """Check that a save is refused while a job runs that copies a node without end."""
    for name in ("from", "to"):
        await qmp.execute("blockdev-add", {"driver": "null-co", "node-name": name, "size": 1 << 30})
    await qmp.execute(
        "blockdev-mirror", {"job-id": "endless", "device": "from", "target": "to", "sync": "full", "speed": 1}
    )
    await check_refused(machine, "job endless is under way", hint="job-cancel endless")
    with machine.monitor.events() as events:
        await qmp.execute("block-job-cancel", {"device": "endless", "force": True})
        async for event in events:
            if event.name == "JOB_STATUS_CHANGE" and (event.data or {}).get("status") == "null":
                break
    for name in ("from", "to"):
        await qmp.execute("blockdev-del", {"node-name": name})


async def check_export(machine: Machine, qmp: Any, node: str, path: Path) -> None:
    """Check that a save is refused while a disk's image is exported."""
    await qmp.execute("nbd-server-start", {"addr": {"type": "unix", "data": {"path": str(path)}}})
    await qmp.execute("block-export-add", {"type": "nbd", "id": "exported", "node-name": node})
    await check_refused(machine, "block export exported is under way", hint="block-export-del exported")
    await qmp.execute("nbd-server-stop")


async def test_obstacles_on_the_command_line_are_named(qemu: str, tmp_path: Path) -> None:
    arguments = (
        *("-device", "virtio-rng-pci,id=theirs,addr=0x1c", "-device", "virtio-rng-pci,addr=0x1d"),
        *("-object", "iothread,id=mine"),
    )
    async with idle_machine(qemu, tmp_path, console="native", qemu_arguments=arguments) as machine:
        await check_refused(
            machine,
            "its console is QEMU's own (native)",
            "vmspawn did not create device theirs, and a copy would lack it",
            "a device that has no id was not created by vmspawn, and a copy would lack it",
            "vmspawn did not create object mine, and a copy would lack it",
            hint="start it with another console",
        )


async def test_a_disk_that_this_qemu_cannot_save_is_named(qemu: str, tmp_path: Path) -> None:
    async with idle_machine(qemu, tmp_path) as machine:
        await machine.attach(Disk(str(make_raw(tmp_path / "fast")), bus="nvme"))
        found = await inner(machine).monitor.execute("query-migrate")
        if not found.get("blocked-reasons"):
            pytest.skip("this QEMU saves NVMe controllers")
        await check_refused(
            machine,
            "disk fast is on bus nvme, which this QEMU cannot save",
            hint=f"vmctl detach-disk {machine.name} fast",
        )


async def test_a_shared_directory_is_named(qemu: str, tmp_path: Path) -> None:
    try:
        program = virtiofsd.find()
    except StartError as error:
        pytest.skip(str(error))
    if not program.is_rust and os.geteuid() != 0:
        pytest.skip("this virtiofsd needs root")
    shared = tmp_path / "shared"
    shared.mkdir()
    async with idle_machine(qemu, tmp_path, binds=(Share(str(shared), "/mnt"),)) as machine:
        await check_refused(
            machine,
            f"directory {shared} of the host is shared with it by virtiofs",
            hint="start it without the directory",
        )
