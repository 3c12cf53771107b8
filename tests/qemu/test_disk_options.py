# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests a disk's options besides its image and bus, and its statistics."""

import os
from pathlib import Path

import pytest

from tests.conftest import MIB, make_qcow2, make_raw
from tests.loop import Loop
from tests.machines import Machine, detach_by_reset, idle_machine
from vmspawn import Disk
from vmspawn.errors import BadConfig, SystemFailure
from vmspawn.storage.limits import Limits

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.usefixtures("nothing_left")]


async def test_a_shared_image_is_attached_to_two_machines(machine: Machine, qemu: str, tmp_path: Path) -> None:
    disk = Disk(str(make_raw(tmp_path / "image", MIB)), bus="virtio-scsi", share=True)
    async with idle_machine(qemu, tmp_path) as other:
        await machine.attach(disk)
        await other.attach(disk)
        # An attach without `share` is refused.
        await other.detach("image")
        with pytest.raises(SystemFailure, match=f"machine {machine.name} uses the image of image"):
            await other.attach(disk._replace(share=False))
        await machine.detach("image")
    with pytest.raises(BadConfig, match="qcow2 format cannot be shared"):
        await machine.attach(Disk(str(make_qcow2(tmp_path / "qcow2")), format="qcow2", bus="virtio-scsi", share=True))


async def test_a_block_device_is_shared_without_the_hosts_cache(machine: Machine, qemu: str, tmp_path: Path) -> None:
    with Loop(tmp_path / "image", MIB) as device:
        disk = Disk(device.path, "disk", "virtio-scsi", cache="none", share=True)
        async with idle_machine(qemu, tmp_path) as other:
            await machine.attach(disk)
            await other.attach(disk)
            nodes = await machine.monitor.execute("query-named-block-nodes", {"flat": True})
            (node,) = (each for each in nodes if each["drv"] == "host_device")
            assert (node["cache"]["direct"], node["ro"]) == (True, False)
            await other.detach("disk")
            with pytest.raises(SystemFailure, match=f"machine {machine.name} uses the image of disk"):
                await other.attach(disk._replace(share=False))
            await machine.detach("disk")


async def test_options_reach_the_nodes(machine: Machine, tmp_path: Path) -> None:
    path = str(make_raw(tmp_path / "image", MIB))
    try:
        os.close(os.open(path, os.O_RDWR | os.O_DIRECT))
    except OSError:
        pytest.skip("this file system has no O_DIRECT")
    await machine.attach(Disk(path, "disk", "virtio-scsi", cache="none", detect_zeroes="unmap"))
    nodes = await machine.monitor.execute("query-named-block-nodes", {"flat": True})
    attached = next(each for each in machine.storage if each.name == "disk")
    assert attached.image is not None
    by_name = {node["node-name"]: node for node in nodes}
    assert by_name[attached.image.file_node]["cache"]["direct"] is True
    assert by_name[attached.identifiers.pivot]["detect_zeroes"] == "unmap"
    await machine.detach("disk")


async def test_an_io_thread_comes_and_goes_with_its_disk(machine: Machine, tmp_path: Path) -> None:
    await machine.attach(Disk(str(make_raw(tmp_path / "image", MIB)), "disk", "virtio-blk", thread=True))
    threads = await machine.monitor.execute("query-iothreads")
    assert len(threads) == 1
    await machine.replace("disk", str(make_qcow2(tmp_path / "other", 2 * MIB)), format="qcow2")
    await machine.limit("disk", Limits(iops=10))
    await detach_by_reset(machine, "disk")
    assert await machine.monitor.execute("query-iothreads") == []


@pytest.mark.parametrize(
    ("disk", "message"),
    [
        (Disk("image", discard="maybe"), "unknown discard mode 'maybe'"),
        (Disk("image", detect_zeroes="maybe"), "unknown zero detection 'maybe'"),
        (Disk("image", detect_zeroes="unmap", discard="ignore"), "discard must be unmap"),
        (Disk("image", cache="maybe"), "unknown cache mode 'maybe'"),
        (Disk("image", aio="maybe"), "unknown asynchronous I/O 'maybe'"),
        (Disk("image", bus="nvme", thread=True), "bus nvme cannot have an I/O thread"),
        (Disk("image", boot_index=-2), "boot index of -2"),
    ],
)
async def test_invalid_options_are_refused(machine: Machine, tmp_path: Path, disk: Disk, message: str) -> None:
    make_raw(tmp_path / "image", MIB)
    with pytest.raises(BadConfig, match=message):
        await machine.attach(disk._replace(path=str(tmp_path / disk.path)))


async def test_the_bus_auto_is_virtio_blk_while_there_are_ports(machine: Machine, tmp_path: Path) -> None:
    taken = [machine.storage._context.layout.pci.take() for _ in range(machine.storage.ports_free)]
    attached = await machine.attach(Disk(str(make_raw(tmp_path / "image", MIB)), "disk", "auto"))
    assert attached.bus == "virtio-scsi"
    await machine.detach("disk")
    for place in taken:
        machine.storage._context.layout.pci.release(place)
    attached = await machine.attach(Disk(str(tmp_path / "image"), "disk", "auto"))
    assert attached.bus == "virtio-blk"
    await detach_by_reset(machine, "disk")


async def test_each_disk_has_statistics(machine: Machine, tmp_path: Path) -> None:
    """QEMU counts requests of qemu-io at a disk's device as it counts the guest's."""
    for bus, request in (("virtio-scsi", "aio_write 0 4k"), ("scsi-cd", "aio_read 0 2k")):
        await machine.attach(Disk(str(make_raw(tmp_path / bus, MIB)), bus, bus))
        for command in (request, "aio_flush"):
            line = f'qemu-io -d {machine.disk(bus).device} "{command}"'
            assert await machine.monitor.execute("human-monitor-command", {"command-line": line}) == ""
    found = await machine.storage.statistics()
    assert (found["virtio-scsi"].writes, found["virtio-scsi"].written_bytes) == (1, 4096)
    # The firmware may have read the medium too.
    assert found["scsi-cd"].reads >= 1
    assert found["scsi-cd"].read_bytes >= 2048
    assert found["scsi-cd"].writes == 0
    for bus in ("virtio-scsi", "scsi-cd"):
        await machine.detach(bus)
