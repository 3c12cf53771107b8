# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests attaching and detaching on a real QEMU, without a guest: refusals, and that nothing is left behind."""

import asyncio
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.commands import DEADLINE
from tests.conftest import make_qcow2, make_raw
from tests.imagefiles import make
from tests.machines import Machine, Resources, event_named, idle_machine, links_of
from tests.qemu.qmp_fixtures import scaled
from vmspawn import Disk
from vmspawn.errors import (
    BadConfig,
    ConfigNotSupported,
    NoFreePort,
    NoSuchStorage,
    QmpError,
    StorageExists,
    StorageImmutable,
    StoragePending,
    SystemFailure,
)
from vmspawn.hotplug.qemu_objects import device_ids
from vmspawn.storage.attached_disk import DETACHED_EVENT
from vmspawn.storage.backing import open_disk

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.usefixtures("nothing_left")]


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
@pytest.mark.parametrize("read_only", [False, True])
async def test_a_scsi_disk_is_attached_and_detached_without_the_guest(
    machine: Machine, tmp_path: Path, image_format: str, read_only: bool
) -> None:
    path = (make_qcow2 if image_format == "qcow2" else make_raw)(tmp_path / "disk")
    disk = Disk(str(path), bus="virtio-scsi", format=image_format, read_only=read_only)
    attached = await machine.attach(disk)
    assert attached.read_only is read_only
    assert await machine.sizes() == {attached.name: 64 << 20, **await boot_sizes(machine)}
    await machine.detach("disk")


async def boot_sizes(machine: Machine) -> dict[str, int]:
    return {each.name: 1 << 20 for each in machine.storage if each.is_boot}


async def test_no_descriptor_set_is_left_once_a_disk_is_attached(machine: Machine, tmp_path: Path) -> None:
    await machine.attach(Disk(str(make_raw(tmp_path / "disk")), bus="virtio-scsi"))
    found = await machine.monitor.execute("query-fdsets")
    assert all(not fdset["fds"] for fdset in found)
    await machine.detach("disk")


async def test_a_disk_works_after_its_file_was_unlinked(machine: Machine, tmp_path: Path) -> None:
    path = make_raw(tmp_path / "disk")
    backing = open_disk(str(path), read_only=False)
    path.unlink()
    await machine.attach_backing(Disk("", "disk", "virtio-scsi"), backing)
    await machine.detach("disk")


async def test_a_name_is_used_once(machine: Machine, tmp_path: Path) -> None:
    await machine.attach(Disk(str(make_raw(tmp_path / "disk")), bus="virtio-scsi"))
    with pytest.raises(StorageExists, match="named disk exists already"):
        await machine.attach(Disk(str(make_raw(tmp_path / "other")), "disk", "virtio-scsi"))
    await machine.detach("disk")


async def test_a_file_is_attached_once_however_it_is_opened(machine: Machine, tmp_path: Path) -> None:
    path = make_raw(tmp_path / "disk")
    os.link(path, tmp_path / "link")
    await machine.attach(Disk(str(path), bus="virtio-scsi"))
    for other in (path, tmp_path / "link"):
        for read_only in (False, True):
            with pytest.raises(StorageExists, match="attached already, as disk"):
                await machine.attach(Disk(str(other), "again", "virtio-scsi", read_only=read_only))
    await machine.detach("disk")


async def test_a_file_may_be_attached_twice_read_only(machine: Machine, tmp_path: Path) -> None:
    path = str(make_raw(tmp_path / "disk"))
    for name in ("one", "two"):
        await machine.attach(Disk(path, name, "virtio-scsi", read_only=True))
    for name in ("one", "two"):
        await machine.detach(name)


async def test_an_image_that_another_machine_uses_is_refused(machine: Machine, qemu: str, tmp_path: Path) -> None:
    path = str(make_raw(tmp_path / "disk"))
    async with idle_machine(qemu, tmp_path) as other:
        await other.attach(Disk(path, bus="virtio-scsi"))
        with pytest.raises(SystemFailure, match=f"machine {other.name} uses the image") as caught:
            await machine.attach(Disk(path, bus="virtio-scsi"))
        assert caught.value.errno_name == "EBUSY"


@pytest.mark.parametrize(
    ("disk", "error", "message"),
    [
        (Disk("none", bus="nvme"), SystemFailure, "No such file"),
        (Disk(".", bus="nvme"), BadConfig, "directory"),
        (Disk("empty"), BadConfig, "is empty"),
        (Disk("disk", bus="floppy"), BadConfig, "unknown bus 'floppy'"),
        (Disk("disk", name="a\nb"), BadConfig, "invalid disk name"),
        (Disk("disk", format="floppy"), BadConfig, "unknown image format"),
        (Disk("disk", format="qcow2"), BadConfig, "not in qcow2 format"),
        (Disk("delta", format="vmdk", read_only=True), BadConfig, r"has a parent, .* \(base\)"),
        (Disk("vhd"), BadConfig, "looks like vpc"),
        (Disk("disk", serial="x" * 21), BadConfig, "invalid serial"),
    ],
)
async def test_images_that_cannot_be_attached_are_refused(
    machine: Machine, tmp_path: Path, disk: Disk, error: type[Exception], message: str
) -> None:
    make_raw(tmp_path / "disk")
    make_raw(tmp_path / "empty", 0)
    make(tmp_path / "base", "vmdk")
    make(tmp_path / "delta", "vmdk", "-b", "base", "-F", "vmdk")
    make(tmp_path / "vhd", "vpc")
    with pytest.raises(error, match=message) as caught:
        await machine.attach(disk._replace(path=str(tmp_path / disk.path)))
    assert "\n" not in str(caught.value)


async def test_a_broken_qcow2_image_is_refused_in_qemus_words(machine: Machine, tmp_path: Path) -> None:
    path = tmp_path / "broken"
    path.write_bytes(b"QFI\xfb" + bytes(1 << 16))
    with pytest.raises(QmpError, match="refused blockdev-add"):
        await machine.attach(Disk(str(path), bus="nvme", format="qcow2"))


async def test_a_writable_descriptor_makes_no_optical_disk(machine: Machine, tmp_path: Path) -> None:
    backing = open_disk(str(make_raw(tmp_path / "disk")), read_only=False)
    with pytest.raises(ConfigNotSupported, match="scsi-cd is read-only"):
        await machine.attach_backing(Disk("", "cd", "scsi-cd"), backing)


async def test_a_lack_of_ports_is_reported_with_a_hint(machine: Machine, tmp_path: Path) -> None:
    free = machine.storage.ports_free
    taken = [machine.storage._context.layout.pci.take() for _ in range(free)]
    with pytest.raises(NoFreePort, match="are in use") as caught:
        await machine.attach(Disk(str(make_raw(tmp_path / "disk")), bus="nvme"))
    assert "hotplug_ports=" in caught.value.hint
    for place in taken:
        machine.storage._context.layout.pci.release(place)


async def test_another_port_is_tried_if_qemu_refuses_the_device(machine: Machine, tmp_path: Path) -> None:
    """A QMP client has used the port: device_add fails, the attach is undone, and another port is tried."""
    stranger = make_raw(tmp_path / "stranger")
    await machine.monitor.execute("blockdev-add", {"driver": "file", "node-name": "foreign", "filename": str(stranger)})
    free = machine.storage._context.layout.pci.take()
    machine.storage._context.layout.pci.release(free)
    # Places are used in turn: occupy the next place.
    upcoming = machine.storage._context.layout.pci._free[0]
    device = {"driver": "virtio-blk-pci", "id": "foreign", "drive": "foreign", **upcoming.properties()}
    await machine.monitor.execute("device_add", device)
    attached = await machine.attach(Disk(str(make_raw(tmp_path / "disk")), bus="virtio-blk"))
    assert attached.place != str(upcoming)
    with pytest.raises(StoragePending):
        await machine.detach(attached.name, timeout=0.1)
    await machine.monitor.execute("device_del", {"id": "foreign"})
    # The firmware does not release the devices; a reset removes them.
    await machine.reboot()
    await machine.detach(attached.name)
    async with asyncio.timeout(30):
        while "foreign" in await device_ids(machine.monitor):
            await machine.monitor.execute("query-status")
    await machine.monitor.execute("blockdev-del", {"node-name": "foreign"})
    await machine.storage.look_at_places()


async def test_an_unknown_disk_cannot_be_detached_and_others_are_named(machine: Machine, tmp_path: Path) -> None:
    (boot,) = (each.name for each in machine.storage)
    disks = [Disk(str(make_raw(tmp_path / f"disk{n}")), bus="virtio-scsi") for n in range(9)]
    for count, hint in ((1, f"its disks: {boot}, disk0"), (9, f"its disks: {boot}, disk0, disk1")):
        for disk in disks[len(list(machine.storage)) - 1 : count]:
            await machine.attach(disk)
        with pytest.raises(NoSuchStorage, match="no disk named nobody") as caught:
            await machine.detach("nobody")
        assert caught.value.hint.startswith(hint)
    assert caught.value.hint.endswith("disk6 and 2 more")
    for number in range(9):
        await machine.detach(f"disk{number}")


async def test_a_boot_disk_cannot_be_detached(machine: Machine) -> None:
    boot = next(each for each in machine.storage if each.is_boot)
    with pytest.raises(StorageImmutable, match="is a boot disk"):
        await machine.detach(boot.name)


@pytest.mark.parametrize("bus", ["virtio-blk", "nvme"])
async def test_a_guest_that_does_not_release_a_disk_makes_the_removal_pending(
    qemu: str, tmp_path: Path, bus: str
) -> None:
    """Firmware ignores the request. The caller gets StoragePending in time and may try again. A reset removes the disk.

    The test has its own machine, because a firmware that was reset resets itself once more, some time later.
    """
    async with idle_machine(qemu, tmp_path) as machine:
        before = await Resources.of(machine)
        await machine.attach(Disk(str(make_raw(tmp_path / "disk")), bus=bus))
        with pytest.raises(StoragePending, match=r"has not released disk.*waited 0\.2 s"):
            await machine.detach("disk", timeout=0.2)
        assert [each.state.value for each in machine.storage if not each.is_boot] == ["detaching"]
        with pytest.raises(StorageExists, match="exists already") as caught:
            await machine.attach(Disk(str(make_raw(tmp_path / "other")), "disk", bus))
        assert "pending" in caught.value.hint
        late = asyncio.create_task(event_named(machine, DETACHED_EVENT))
        again = asyncio.create_task(machine.detach("disk", timeout=20))
        await asyncio.sleep(0)
        await machine.reboot()
        assert await late == {"name": "disk"}
        await again
        assert await Resources.of(machine) == before


async def test_a_disk_is_detached_if_a_qmp_client_removes_its_device(machine: Machine, tmp_path: Path) -> None:
    await machine.attach(Disk(str(make_raw(tmp_path / "disk")), bus="virtio-scsi"))
    detached = asyncio.create_task(event_named(machine, DETACHED_EVENT))
    await asyncio.sleep(0)
    await machine.monitor.execute("device_del", {"id": machine.disk("disk").identifiers.device})
    assert await detached == {"name": "disk"}
    assert not [each for each in machine.storage if not each.is_boot]


async def test_a_failed_attach_causes_no_events(machine: Machine, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.write_bytes(b"QFI\xfb" + bytes(1 << 16))
    names = set()
    with machine.events() as events:
        with pytest.raises(QmpError, match="refused blockdev-add"):
            await machine.attach(Disk(str(broken), bus="virtio-scsi", format="qcow2"))
        await machine.attach(Disk(str(make_raw(tmp_path / "disk")), bus="virtio-scsi"))
        await machine.detach("disk")
        async with asyncio.timeout(DEADLINE):
            async for event in events:
                if event.name.startswith("Storage"):
                    names.add((event.data or {})["name"])
                if event.name == DETACHED_EVENT and "disk" in names:
                    break
    assert names == {"disk"}


async def test_a_cancelled_attach_is_undone(machine: Machine, tmp_path: Path) -> None:
    path = str(make_raw(tmp_path / "disk"))
    loop = asyncio.get_running_loop()
    # A thread opens the image, and cannot be stopped. At the end of this block, all threads have ended.
    with ThreadPoolExecutor() as threads:
        loop.set_default_executor(threads)
        for turns in range(12):
            task = asyncio.create_task(machine.attach(Disk(path, bus="virtio-scsi")))
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait({task})
            if not task.cancelled():
                await machine.detach("disk")
            for each in machine.storage:
                if each.unwinding is not None:
                    await asyncio.wait({each.unwinding})
        loop.set_default_executor(ThreadPoolExecutor())
    # The event loop closes the image that a thread has opened in vain.
    async with asyncio.timeout(DEADLINE):
        while path in links_of(os.getpid()):  # noqa: ASYNC110 (nothing reports it)
            await asyncio.sleep(0.01)


async def test_disks_are_attached_and_detached_concurrently(machine: Machine, tmp_path: Path) -> None:
    names = [f"disk{n}" for n in range(12)]

    async def attach_and_detach(name: str) -> None:
        await machine.attach(Disk(str(make_raw(tmp_path / name)), bus="virtio-scsi"))
        await machine.detach(name)

    await asyncio.gather(*(attach_and_detach(name) for name in names))


@pytest.mark.scaled
async def test_repeated_attaches_and_detaches_leave_nothing_behind(machine: Machine, tmp_path: Path) -> None:
    """The fixture compares nodes, descriptor sets, devices, ports and open files of both processes."""
    path = str(make_raw(tmp_path / "disk"))
    for _ in range(scaled(40)):
        await machine.attach(Disk(path, bus="virtio-scsi"))
        await machine.detach("disk")
