# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests vmspawn's handling of QEMU's faults and refusals in hot-plug: a one-line error, and nothing left behind."""

import errno
import os
import re
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.conftest import MIB, make_qcow2, make_raw
from tests.image_users import other_user
from tests.machines import Machine, Resources, detach_by_reset, idle_machine, links_of, unchanged
from vmspawn import Disk
from vmspawn.errors import BadConfig, NoFreePort, QmpError, StoragePending, SystemFailure
from vmspawn.qmp.monitor import Command
from vmspawn.storage.backing import inspect_descriptor, open_disk

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def machine(qemu: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Machine]:
    async with idle_machine(qemu, tmp_path_factory.mktemp("machine")) as running:
        yield running


@pytest_asyncio.fixture(loop_scope="module", autouse=True)
async def nothing_left(machine: Machine) -> AsyncIterator[None]:
    async with unchanged(machine):
        yield


async def remove_all(machine: Machine) -> None:
    """Detach all hot-plugged disks."""
    await detach_by_reset(machine, *(each.name for each in machine.storage if not each.is_boot))


# Ports and slots.


@pytest.mark.parametrize(("machine_type", "ports"), [("q35", 64), ("pc", 27)])
async def test_all_places_are_used_given_back_and_used_again(
    qemu: str, tmp_path: Path, machine_type: str, ports: int
) -> None:
    """On pc, the last place is slot 31: while it is in use, QEMU 11.1 finds no slot itself although others are free."""
    async with idle_machine(qemu, tmp_path, machine_type=machine_type, hotplug_ports=ports) as machine:
        before = await Resources.of(machine)
        for turn in range(2):
            # The boot disk of pc uses one of the slots.
            count = machine.storage.ports_free
            assert count == (ports if machine_type == "q35" else ports - 1)
            for number in range(count):
                bus = "nvme" if number % 8 == 0 else "virtio-blk"
                await machine.attach(Disk(str(make_raw(tmp_path / f"disk{number}", MIB)), bus=bus))
            with pytest.raises(NoFreePort, match=f"all {ports} are in use") as caught:
                await machine.attach(Disk(str(make_raw(tmp_path / f"more{turn}", MIB))))
            assert "hotplug_ports=" in caught.value.hint
            await remove_all(machine)
        assert await Resources.of(machine) == before


async def test_a_port_is_in_use_until_the_guest_releases_it(qemu: str, tmp_path: Path) -> None:
    async with idle_machine(qemu, tmp_path, hotplug_ports=1) as machine:
        await machine.attach(Disk(str(make_raw(tmp_path / "first", MIB))))
        with pytest.raises(StoragePending):
            await machine.detach("first", timeout=0)
        for bus in ("virtio-blk", "nvme"):
            with pytest.raises(NoFreePort, match="no free hot-plug port: all 1 are in use"):
                await machine.attach(Disk(str(make_raw(tmp_path / "second", MIB)), bus=bus))
        # Force releases the image, but not the port.
        await machine.detach("first", timeout=0, force=True)
        with pytest.raises(NoFreePort):
            await machine.attach(Disk(str(tmp_path / "second")))
        await remove_all(machine)
        await machine.attach(Disk(str(tmp_path / "second")))


async def test_a_machine_without_ports_reports_it(qemu: str, tmp_path: Path) -> None:
    async with idle_machine(qemu, tmp_path, hotplug_ports=0) as machine:
        path = str(make_raw(tmp_path / "disk", MIB))
        with pytest.raises(NoFreePort, match="no free hot-plug port: this machine has none") as caught:
            await machine.attach(Disk(path))
        assert "virtio-scsi" in caught.value.hint
        attached = await machine.attach(Disk(path, bus="auto"))
        assert attached.bus == "virtio-scsi"


# Images.


async def test_unusual_images_are_accepted(machine: Machine, tmp_path: Path) -> None:
    """An image's size need not be a multiple of a sector, and the image may have been unlinked."""
    (tmp_path / "odd").write_bytes(bytes(1000))
    await machine.attach(Disk(str(tmp_path / "odd"), bus="virtio-scsi"))
    await machine.detach("odd")
    backing = open_disk(str(make_raw(tmp_path / "nameless", MIB)), read_only=False)
    (tmp_path / "nameless").unlink()
    await machine.attach_backing(Disk("", "nameless", "virtio-scsi", "raw"), backing)
    assert (await machine.sizes())["nameless"] == MIB
    await machine.detach("nameless")


@pytest.mark.parametrize("path", ["/dev/null", "/dev/zero"])
async def test_a_character_device_is_not_an_image(machine: Machine, path: str) -> None:
    with pytest.raises(BadConfig, match=f"{path} is a character device, not an image"):
        await machine.attach(Disk(path, bus="virtio-scsi"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may open everything")
async def test_an_image_that_may_not_be_written_is_refused_or_attached_read_only(
    machine: Machine, tmp_path: Path
) -> None:
    path = make_raw(tmp_path / "disk", MIB)
    path.chmod(0o444)
    with pytest.raises(SystemFailure, match="Permission denied") as caught:
        await machine.attach(Disk(str(path), bus="virtio-scsi"))
    assert "read-only" in caught.value.hint
    await machine.attach(Disk(str(path), bus="virtio-scsi", read_only=True))
    await machine.detach("disk")


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
@pytest.mark.parametrize("read_only", [False, True])
async def test_an_image_that_another_machine_writes_is_refused_and_its_holder_named(
    machine: Machine, qemu: str, tmp_path: Path, image_format: str, read_only: bool
) -> None:
    """For raw, device_add fails; for qcow2, blockdev-add does. A raw image may have readers beside a writer."""
    path = (make_raw if image_format == "raw" else make_qcow2)(tmp_path / "image", MIB)
    disk = Disk(str(path), "disk", "virtio-scsi", image_format)
    async with idle_machine(qemu, tmp_path) as other:
        await other.attach(disk)
        with pytest.raises(SystemFailure, match=f"machine {other.name} uses the image of disk") as caught:
            await machine.attach(disk._replace(read_only=read_only))
        assert caught.value.errno == errno.EBUSY
        assert "lock" in str(caught.value)
    await machine.attach(disk._replace(read_only=read_only))
    await machine.detach("disk")


async def test_a_process_that_holds_an_image_is_named(machine: Machine, tmp_path: Path) -> None:
    path = make_raw(tmp_path / "image", MIB)
    with (
        other_user(path) as pid,
        pytest.raises(SystemFailure, match=rf"qemu-io \(process {pid}\) uses the image of image"),
    ):
        await machine.attach(Disk(str(path), bus="virtio-scsi"))
    await machine.attach(Disk(str(path), bus="virtio-scsi"))
    await machine.detach("image")


# Descriptors.


async def test_flags_of_a_descriptor_are_made_to_fit(machine: Machine, tmp_path: Path) -> None:
    """QEMU 11.1 compares O_DIRECT with the node's cache mode, and would not find the descriptor."""
    path = make_raw(tmp_path / "image", MIB)
    try:
        fd = os.open(path, os.O_RDWR | os.O_DIRECT)
    except OSError:
        pytest.skip("this file system has no O_DIRECT")
    for cache in ("writeback", "none"):
        backing = inspect_descriptor(os.dup(fd))
        await machine.attach_backing(Disk("", "disk", "virtio-scsi", "raw", cache=cache), backing)
        await machine.detach("disk")
    os.close(fd)


async def test_aio_that_qemu_lacks_is_refused_in_its_words(machine: Machine, tmp_path: Path) -> None:
    """io_uring needs both QEMU and the host. An explicit wish for it is never replaced by another choice."""
    path = str(make_raw(tmp_path / "image", MIB))
    disk = Disk(path, "disk", "virtio-scsi", aio="io_uring")
    node = {"driver": "file", "node-name": "probe", "filename": path, "aio": "io_uring"}
    (probed,) = await machine.monitor.execute_all([Command("blockdev-add", node)])
    if isinstance(probed, QmpError):
        assert "io_uring" in probed.description
        with pytest.raises(QmpError, match=re.escape(probed.description)):
            await machine.attach(disk)
        return
    await machine.monitor.execute("blockdev-del", {"node-name": "probe"})
    await machine.attach(disk)
    assert "anon_inode:[io_uring]" in links_of(machine.pid)
    await machine.detach("disk")
