# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests disks whose nodes or images are used by others, through QMP or on the host, and displaced disks."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import MIB, make_qcow2, make_raw
from tests.image_users import other_user
from tests.machines import Machine, Resources, idle_machine, links_of
from vmspawn import Disk, Limits
from vmspawn.errors import (
    BadConfig,
    ConfigNotSupported,
    NoFreePort,
    NoSuchStorage,
    QmpError,
    StorageExists,
    StoragePending,
    SystemFailure,
)
from vmspawn.qmp.monitor import Monitor

DEADLINE = 60.0


async def until_closed(machine: Machine, image: Path) -> None:
    """Wait until QEMU has closed an image."""
    async with asyncio.timeout(DEADLINE):
        while str(image) in links_of(machine.pid):
            await machine.monitor.execute("query-status")


def names(machine: Machine) -> set[str]:
    return {each.name for each in machine.storage if not each.is_boot}


@pytest.fixture
async def idle(qemu: str, tmp_path: Path) -> AsyncIterator[Machine]:
    async with idle_machine(qemu, tmp_path) as machine:
        yield machine


# A failed attach.


@pytest.mark.parametrize("bus", ["virtio-blk", "nvme", "virtio-scsi"])
async def test_nothing_is_left_of_a_failed_attach(idle: Machine, tmp_path: Path, bus: str) -> None:
    """There are more attempts than ports. QEMU 7.2 keeps a failed nvme device's nodes, but not the image."""
    image = make_raw(tmp_path / "disk.raw", MIB)
    before = await Resources.of(idle)
    with other_user(image) as pid:
        for _ in range(before.ports_free + 2):
            with pytest.raises(SystemFailure, match=rf"^qemu-io \(process {pid}\) uses the image of disk.raw"):
                await idle.attach(Disk(str(image), bus=bus))
            assert names(idle) == set()
            assert str(image) not in links_of(idle.pid)
        assert idle.storage.ports_free == before.ports_free
    await idle.attach(Disk(str(image), bus=bus))
    assert (await idle.storage.views())["disk.raw"].size == MIB


@pytest.mark.parametrize("bus", ["virtio-blk", "nvme", "virtio-scsi"])
async def test_an_odd_size_without_the_page_cache_is_refused(idle: Machine, tmp_path: Path, bus: str) -> None:
    image = make_raw(tmp_path / "odd.raw", MIB + 512 + 1)
    free = idle.storage.ports_free
    with pytest.raises(BadConfig, match="O_DIRECT") as caught:
        await idle.attach(Disk(str(image), bus=bus, cache="none"))
    assert "use cache writeback" in caught.value.hint
    assert names(idle) == set()
    assert str(image) not in links_of(idle.pid)
    assert idle.storage.ports_free == free


async def test_the_remains_of_a_failed_attach_do_not_disturb_an_adoption(idle: Machine, tmp_path: Path) -> None:
    image = make_raw(tmp_path / "disk.raw", MIB)
    with other_user(image), pytest.raises(SystemFailure):
        await idle.attach(Disk(str(image), bus="nvme"))
    await idle.leave()
    adopted = await Machine.adopt(idle.name)
    try:
        assert adopted.adoption_notes == []
        await adopted.attach(Disk(str(image), bus="nvme"))
    finally:
        await adopted.close()


async def test_a_machine_that_has_the_image_itself_is_named(idle: Machine, tmp_path: Path) -> None:
    image = make_raw(tmp_path / "disk.raw", MIB)
    async with idle.qmp() as session:
        await session.execute("blockdev-add", {"driver": "file", "node-name": "mine", "filename": str(image)})
        await session.execute("device_add", {"driver": "scsi-hd", "drive": "mine", "bus": "scsi0.0", "id": "mine"})
    with pytest.raises(SystemFailure, match=f"machine {idle.name} itself uses the image"):
        await idle.attach(Disk(str(image)))


# Users in QEMU.


async def export(session: Monitor, node: str, folder: Path) -> None:
    """Export a node by NBD."""
    address = {"type": "unix", "data": {"path": str(folder / "nbd")}}
    await session.execute("nbd-server-start", {"addr": address})
    await session.execute("block-export-add", {"type": "nbd", "id": "exported", "node-name": node})


async def test_an_exported_image_can_be_replaced(idle: Machine, tmp_path: Path) -> None:
    old, new = make_qcow2(tmp_path / "old", MIB), make_qcow2(tmp_path / "new", MIB)
    attached = await idle.attach(Disk(str(old), "disk", format="qcow2", bus="virtio-scsi"))
    async with idle.qmp() as session:
        await export(session, idle.disk(attached.name).images[0].format_node, tmp_path)
        assert await idle.replace("disk", str(new), format="qcow2") == MIB
        found = (await idle.storage.views())["disk"]
        assert found.path == str(new)
        assert found.notice == f"QEMU still has {old} open, used by the nbd export exported"
        with pytest.raises(StorageExists, match="still has this file open, as a former image of disk"):
            await idle.attach(Disk(str(old), "again", format="qcow2", bus="virtio-scsi"))
        await idle.replace("disk", str(make_qcow2(tmp_path / "newer", MIB)), format="qcow2")
        await session.execute("block-export-del", {"id": "exported"})
        await until_closed(idle, old)
        assert not (await idle.storage.views())["disk"].notice
    await idle.attach(Disk(str(old), "again", format="qcow2", bus="virtio-scsi"))


async def test_a_replaced_image_is_closed_after_an_adoption(idle: Machine, tmp_path: Path) -> None:
    old, new = make_qcow2(tmp_path / "old", MIB), make_qcow2(tmp_path / "new", MIB)
    await idle.attach(Disk(str(old), "disk", format="qcow2", bus="virtio-scsi"))
    async with idle.qmp() as session:
        await export(session, idle.disk("disk").images[0].format_node, tmp_path)
        await idle.replace("disk", str(new), format="qcow2")
    await idle.leave()
    adopted = await Machine.adopt(idle.name)
    try:
        assert "used by the nbd export" in (await adopted.storage.views())["disk"].notice
        async with adopted.qmp() as session:
            await session.execute("block-export-del", {"id": "exported"})
        await until_closed(adopted, old)
        await adopted.detach("disk")
        assert str(new) not in links_of(adopted.pid)
    finally:
        await adopted.close()


@pytest.mark.parametrize("bus", ["virtio-blk", "virtio-scsi"])
async def test_force_succeeds_only_if_the_image_is_closed(idle: Machine, tmp_path: Path, bus: str) -> None:
    image = make_qcow2(tmp_path / "disk.qcow2", MIB)
    await idle.attach(Disk(str(image), "disk", format="qcow2", bus=bus))
    async with idle.qmp() as session:
        await export(session, idle.disk("disk").images[0].format_node, tmp_path)
        with pytest.raises(StoragePending):
            await idle.detach("disk", timeout=0.5)
        for _ in range(2):
            with pytest.raises(
                StoragePending, match=r"QEMU still has the image of disk open.*export exported"
            ) as caught:
                await idle.detach("disk", timeout=0.5, force=True)
            assert "QMP client" in caught.value.hint
            assert str(image) in links_of(idle.pid)
        await session.execute("block-export-del", {"id": "exported"})
        await until_closed(idle, image)
        if bus == "virtio-blk":
            # The firmware does not release the device.
            await idle.detach("disk", timeout=0.5, force=True)
            assert not idle.disk("disk").has_open_image
        else:
            # The removal, which needs no guest, may have completed already.
            with contextlib.suppress(NoSuchStorage):
                await idle.detach("disk", timeout=DEADLINE, force=True)
            assert names(idle) == set()


async def test_a_pending_removal_names_the_users_of_the_image(idle: Machine, tmp_path: Path) -> None:
    image = make_raw(tmp_path / "disk.raw", MIB)
    make_raw(tmp_path / "target.raw", MIB)
    await idle.attach(Disk(str(image), "disk", bus="virtio-scsi"))
    pivot = idle.disk("disk").identifiers.pivot
    async with idle.qmp() as session:
        await mirror(session, pivot, tmp_path / "target.raw")
        with pytest.raises(SystemFailure, match="disk is used by the block job job") as resized:
            await idle.resize("disk", 2 * MIB)
        assert "query-block-jobs" in resized.value.hint
        with pytest.raises(StoragePending, match=r"QEMU has not closed.*used by the block job job") as caught:
            await idle.detach("disk", timeout=1.0)
        assert "guest" not in caught.value.hint
        await session.execute("block-job-cancel", {"device": "job"})
        async with asyncio.timeout(DEADLINE):
            while "disk" in names(idle):
                await idle.monitor.execute("query-status")


async def mirror(session: Monitor, node: str, target: Path) -> None:
    """Start a mirror, and wait until it is ready."""
    with session.events() as events:
        await session.execute("blockdev-add", {"driver": "file", "node-name": "target", "filename": str(target)})
        wanted = {"job-id": "job", "device": node, "target": "target", "sync": "full"}
        await session.execute("blockdev-mirror", wanted)
        async with asyncio.timeout(DEADLINE):
            async for event in events:
                if event.name == "BLOCK_JOB_READY":
                    return


# Displaced disks: a QMP client has put another file in the place of the image.


async def displace(machine: Machine, how: str, folder: Path) -> Path:
    """Put another file under a disk as a QMP client would; returns the file."""
    attached = machine.disk("disk")
    pivot, image = attached.identifiers.pivot, attached.images[0]
    node = {"pivot": pivot, "image": image.top_node, "file": image.file_node}[how.split()[0]]
    async with machine.qmp() as session:
        if how.endswith("mirror"):
            target = make_raw(folder / "target.raw", MIB)
            await mirror(session, node, target)
            with session.events() as events:
                await session.execute("job-complete", {"id": "job"})
                async with asyncio.timeout(DEADLINE):
                    async for event in events:
                        if event.name == "BLOCK_JOB_COMPLETED":
                            return target
        overlay = make_qcow2(folder / "overlay.qcow2", MIB)
        await session.execute("blockdev-add", {"driver": "file", "node-name": "file", "filename": str(overlay)})
        format_node: dict[str, Any] = {"driver": "qcow2", "node-name": "overlay", "file": "file", "backing": None}
        await session.execute("blockdev-add", format_node)
        await session.execute("blockdev-snapshot", {"node": node, "overlay": "overlay"})
        return overlay


@pytest.mark.parametrize("how", ["pivot mirror", "pivot snapshot", "image snapshot", "file snapshot"])
async def test_a_displaced_disk_is_shown_and_not_changed(idle: Machine, tmp_path: Path, how: str) -> None:
    image = make_qcow2(tmp_path / "disk.qcow2", MIB)
    await idle.attach(Disk(str(image), "disk", format="qcow2", bus="virtio-scsi"))
    real = await displace(idle, how, tmp_path)
    await check_displaced(idle, real, tmp_path)
    await idle.leave()
    adopted = await Machine.adopt(idle.name)
    try:
        assert any(f"disk uses {real}" in note for note in adopted.adoption_notes)
        await check_displaced(adopted, real, tmp_path)
    finally:
        await adopted.close()


async def check_displaced(machine: Machine, real: Path, folder: Path) -> None:
    found = (await machine.storage.views())["disk"]
    assert found.path == str(real)
    assert found.notice == f"disk uses {real}, which a QMP client has put in the place of its image"
    other = make_raw(folder / "other", MIB)
    for change in (
        lambda: machine.resize("disk", 4 * MIB),
        lambda: machine.limit("disk", Limits(iops=10)),
        lambda: machine.replace("disk", str(other)),
    ):
        with pytest.raises(ConfigNotSupported, match=f"disk uses {real}"):
            await change()


async def test_a_job_that_runs_displaces_nothing(idle: Machine, tmp_path: Path) -> None:
    """QEMU inserts filters while a job runs."""
    image = make_raw(tmp_path / "disk.raw", MIB)
    await idle.attach(Disk(str(image), "disk", bus="virtio-scsi"))
    async with idle.qmp() as session:
        await mirror(session, idle.disk("disk").identifiers.pivot, make_raw(tmp_path / "target.raw", MIB))
    found = (await idle.storage.views())["disk"]
    assert (found.size, found.path, found.notice) == (MIB, str(image), "")
    await idle.limit("disk", Limits(iops=10))


async def test_a_displaced_disk_can_be_detached(idle: Machine, tmp_path: Path) -> None:
    image = make_raw(tmp_path / "disk.raw", MIB)
    await idle.attach(Disk(str(image), "disk", bus="virtio-scsi"))
    await displace(idle, "pivot mirror", tmp_path)
    await idle.detach("disk", timeout=DEADLINE)
    assert str(image) not in links_of(idle.pid)
    with pytest.raises(QmpError):
        await idle.monitor.execute("blockdev-del", {"node-name": "drive1"})


# Ports that QMP clients use.


@pytest.mark.parametrize("machine_type", ["q35", "pc"])
async def test_a_port_that_a_client_uses_is_skipped(qemu: str, tmp_path: Path, machine_type: str) -> None:
    async with (
        idle_machine(qemu, tmp_path, machine_type=machine_type, hotplug_ports=4) as machine,
        machine.qmp() as session,
    ):
        for place in machine.storage._context.layout.pci.places[:2]:
            device = {"driver": "virtio-rng-pci", "id": f"other{str(place)[-1]}", **place.properties()}
            await session.execute("device_add", device)
        await machine.storage.look_at_places()
        assert machine.storage.ports_free == 2
        for name in ("one", "two"):
            await machine.attach(Disk(str(make_raw(tmp_path / name, MIB))))
        with pytest.raises(NoFreePort):
            await machine.attach(Disk(str(make_raw(tmp_path / "three", MIB))))


async def test_the_first_attach_beside_a_clients_device_succeeds(idle: Machine, tmp_path: Path) -> None:
    first = idle.storage._context.layout.pci.places[0]
    free = idle.storage.ports_free
    async with idle.qmp() as session:
        await session.execute("device_add", {"driver": "virtio-rng-pci", "id": "other", **first.properties()})
    await idle.attach(Disk(str(make_raw(tmp_path / "disk", MIB))))
    assert idle.disk("disk").place != first
    assert idle.storage.ports_free == free - 2


async def test_a_boot_index_belongs_to_one_disk(idle: Machine, tmp_path: Path) -> None:
    (boot,) = idle.storage
    with pytest.raises(StorageExists, match=f"the disk {boot.name} has boot index 0 already"):
        await idle.attach(Disk(str(make_raw(tmp_path / "disk", MIB)), boot_index=0))
