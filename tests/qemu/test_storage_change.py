# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests the changes of attached disks, and refused changes: a one-line error, and the disk stays as it was."""

import asyncio
import errno
import os
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import MIB, make_qcow2, make_raw
from tests.loop import Loop
from tests.machines import Machine, Resources, detach_by_reset, event_named, idle_machine
from tests.qemu.storage_model import open_images
from vmspawn import Disk
from vmspawn.errors import (
    BadConfig,
    ConfigNotSupported,
    NoSuchStorage,
    QmpError,
    StorageExists,
    StorageImmutable,
    SystemFailure,
    VmspawnError,
)
from vmspawn.storage.backing import open_disk
from vmspawn.storage.changes import CHANGED_EVENT
from vmspawn.storage.limits import NO_LIMITS, Limits

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.usefixtures("nothing_left")]

BUSES = ("virtio-blk", "nvme", "virtio-scsi")


# Another image.


@pytest.mark.parametrize("old", ["raw", "qcow2"])
@pytest.mark.parametrize("new", ["raw", "qcow2"])
async def test_an_image_is_replaced_by_one_of_any_format(machine: Machine, tmp_path: Path, old: str, new: str) -> None:
    makers = {"raw": make_raw, "qcow2": make_qcow2}
    first, second = makers[old](tmp_path / "first", 4 * MIB), makers[new](tmp_path / "second", 6 * MIB)
    await machine.attach(Disk(str(first), "disk", "virtio-scsi", old))
    assert set(open_images(machine.pid, tmp_path)) == {"first"}
    changed = asyncio.create_task(event_named(machine, CHANGED_EVENT))
    await asyncio.sleep(0)
    assert await machine.replace("disk", str(second), format=new) == 6 * MIB
    assert await changed == {"name": "disk"}
    # QEMU has closed the old image, and has the new one open once.
    assert set(open_images(machine.pid, tmp_path)) == {"second"}
    assert (await machine.sizes())["disk"] == 6 * MIB
    await machine.detach("disk")


async def test_a_smaller_image_must_be_asked_for(machine: Machine, tmp_path: Path) -> None:
    first, second = make_raw(tmp_path / "first", 4 * MIB), make_raw(tmp_path / "second", 2 * MIB)
    await machine.attach(Disk(str(first), "disk", "virtio-scsi"))
    with pytest.raises(BadConfig, match=f"new image has {2 * MIB} bytes and the disk {4 * MIB}") as caught:
        await machine.replace("disk", str(second))
    assert "shrink=True" in caught.value.hint
    assert set(open_images(machine.pid, tmp_path)) == {"first"}
    assert await machine.replace("disk", str(second), shrink=True) == 2 * MIB
    await machine.detach("disk")


async def test_an_nvme_disk_takes_only_an_image_of_its_size(machine: Machine, tmp_path: Path) -> None:
    await machine.attach(Disk(str(make_raw(tmp_path / "first", 4 * MIB)), "disk", "nvme"))
    with pytest.raises(ConfigNotSupported, match="bus nvme cannot change its size"):
        await machine.replace("disk", str(make_raw(tmp_path / "larger", 6 * MIB)), shrink=True)
    assert await machine.replace("disk", str(make_qcow2(tmp_path / "same", 4 * MIB)), format="qcow2") == 4 * MIB
    assert set(open_images(machine.pid, tmp_path)) == {"same"}
    await detach_by_reset(machine, "disk")


async def test_a_writable_disk_takes_no_read_only_image(machine: Machine, tmp_path: Path) -> None:
    await machine.attach(Disk(str(make_raw(tmp_path / "first", MIB)), "disk", "virtio-scsi"))
    backing = open_disk(str(make_raw(tmp_path / "second", MIB)), read_only=True)
    with pytest.raises(SystemFailure, match="is writable and the new image is not") as caught:
        await machine.replace_backing("disk", backing)
    assert caught.value.errno == errno.EROFS
    await machine.detach("disk")


async def test_a_read_only_disk_stays_read_only(machine: Machine, tmp_path: Path) -> None:
    await machine.attach(Disk(str(make_raw(tmp_path / "first", MIB)), "disk", "virtio-scsi", read_only=True))
    with pytest.raises(ConfigNotSupported, match="a read-only disk cannot change its size"):
        await machine.replace("disk", str(make_raw(tmp_path / "larger", 2 * MIB)))
    await machine.replace("disk", str(make_raw(tmp_path / "second", MIB)))
    attached = next(each for each in machine.storage if each.name == "disk")
    assert attached.image is not None
    nodes = await machine.monitor.execute("query-named-block-nodes", {"flat": True})
    writable = {node["node-name"] for node in nodes if not node["ro"]}
    assert not writable & {attached.image.file_node, attached.identifiers.pivot}
    await machine.detach("disk")


@pytest.mark.parametrize(
    ("path", "options", "error", "message"),
    [
        ("none", {}, SystemFailure, "No such file"),
        (".", {}, BadConfig, "is a directory"),
        ("empty", {}, BadConfig, "is empty"),
        ("raw", {"format": "qcow2"}, BadConfig, "not in qcow2 format"),
        ("broken", {"format": "qcow2"}, QmpError, "refused blockdev-add"),
        ("first", {}, StorageExists, "attached already, as disk"),
    ],
)
async def test_a_refused_replacement_changes_nothing(
    machine: Machine, tmp_path: Path, path: str, options: dict[str, Any], error: type[VmspawnError], message: str
) -> None:
    make_raw(tmp_path / "empty", 0)
    make_raw(tmp_path / "raw", MIB)
    (tmp_path / "broken").write_bytes(b"QFI\xfb" + bytes(1 << 16))
    await machine.attach(Disk(str(make_raw(tmp_path / "first", MIB)), "disk", "virtio-scsi"))
    attached = await Resources.of(machine)
    with pytest.raises(error, match=message) as caught:
        await machine.replace("disk", str(tmp_path / path), **options)
    assert "\n" not in str(caught.value)
    assert await Resources.of(machine) == attached
    assert (await machine.sizes())["disk"] == MIB
    await machine.detach("disk")


async def test_a_refused_replacement_names_the_machine_that_writes_to_it(
    machine: Machine, qemu: str, tmp_path: Path
) -> None:
    taken = str(make_raw(tmp_path / "taken", MIB))
    await machine.attach(Disk(str(make_raw(tmp_path / "first", MIB)), "disk", "virtio-scsi"))
    attached = await Resources.of(machine)
    async with idle_machine(qemu, tmp_path) as other:
        await other.attach(Disk(taken, bus="virtio-scsi"))
        with pytest.raises(
            SystemFailure, match=f'machine {other.name} uses the image of disk .*"?write"? lock'
        ) as caught:
            await machine.replace("disk", taken)
        assert caught.value.errno == errno.EBUSY
    assert (await Resources.of(machine)).nodes == attached.nodes
    await machine.detach("disk")


@pytest.mark.parametrize("what", ["replace", "resize", "limit", "insert", "eject"])
async def test_an_unknown_disk_cannot_be_changed(machine: Machine, tmp_path: Path, what: str) -> None:
    path = str(make_raw(tmp_path / "disk", MIB))
    changes: dict[str, Callable[[], Awaitable[object]]] = {
        "replace": lambda: machine.replace("nobody", path),
        "resize": lambda: machine.resize("nobody", MIB),
        "limit": lambda: machine.limit("nobody", NO_LIMITS),
        "insert": lambda: machine.insert_media("nobody", path),
        "eject": lambda: machine.eject_media("nobody"),
    }
    with pytest.raises(NoSuchStorage, match="no disk named nobody"):
        await changes[what]()


async def test_a_boot_disk_can_be_neither_replaced_nor_forced_out(machine: Machine, tmp_path: Path) -> None:
    boot = next(each for each in machine.storage if each.is_boot)
    with pytest.raises(StorageImmutable, match="cannot be replaced"):
        await machine.replace(boot.name, str(make_raw(tmp_path / "other", MIB)))
    with pytest.raises(StorageImmutable, match="cannot be detached"):
        await machine.detach(boot.name, force=True)


# Limits.


async def throttling(machine: Machine) -> list[dict[str, int]]:
    """Return the limits of QEMU's throttle groups, whatever node uses them."""
    groups = await machine.monitor.execute("qom-list", {"path": "/objects"})
    names = [each["name"] for each in groups if each["type"] == "child<throttle-group>"]
    found = [
        await machine.monitor.execute("qom-get", {"path": f"/objects/{name}", "property": "limits"}) for name in names
    ]
    limited = [{key: value for key, value in each.items() if value and not key.endswith("-length")} for each in found]
    return [each for each in limited if each]


@pytest.mark.parametrize("bus", ["virtio-scsi", "scsi-cd"])
async def test_limits_are_set_changed_and_removed(machine: Machine, tmp_path: Path, bus: str) -> None:
    await machine.attach(Disk(str(make_raw(tmp_path / "image", MIB)), "disk", bus))
    await machine.limit("disk", Limits(iops=100, bps=1 << 20, burst=3))
    assert await throttling(machine) == [
        {"iops-total": 100, "iops-total-max": 300, "bps-total": 1 << 20, "bps-total-max": 3 << 20}
    ]
    await machine.limit("disk", Limits(iops_read=5, bps_write=6))
    assert await throttling(machine) == [{"iops-read": 5, "bps-write": 6}]
    await machine.limit("disk", NO_LIMITS)
    assert await throttling(machine) == []
    await machine.detach("disk")


async def test_limits_apply_at_once_and_to_a_replacement(machine: Machine, tmp_path: Path) -> None:
    limits = Limits(iops_write=7)
    await machine.attach(Disk(str(make_raw(tmp_path / "image", MIB)), "disk", "virtio-scsi", limits=limits))
    assert await throttling(machine) == [{"iops-write": 7}]
    await machine.replace("disk", str(make_qcow2(tmp_path / "other", MIB)), format="qcow2")
    assert await throttling(machine) == [{"iops-write": 7}]
    await machine.detach("disk")


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (Limits(iops=-1), "iops of -1 is out of range"),
        (Limits(iops=1, iops_read=1), "iops and iops-read or iops-write exclude each other"),
        (Limits(bps=1, bps_write=1), "bps and bps-read or bps-write exclude each other"),
        (Limits(iops=1, burst=0.5), "burst of 0.5 is out of range"),
    ],
)
async def test_invalid_limits_are_refused(machine: Machine, tmp_path: Path, limits: Limits, message: str) -> None:
    await machine.attach(Disk(str(make_raw(tmp_path / "image", MIB)), "disk", "virtio-scsi"))
    with pytest.raises(BadConfig, match=message):
        await machine.limit("disk", limits)
    await machine.detach("disk")
    with pytest.raises(BadConfig, match=message):
        await machine.attach(Disk(str(tmp_path / "image"), "disk", "virtio-scsi", limits=limits))


# The size.


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
async def test_a_disk_and_its_image_grow(machine: Machine, tmp_path: Path, image_format: str) -> None:
    path = (make_raw if image_format == "raw" else make_qcow2)(tmp_path / "image", MIB)
    await machine.attach(Disk(str(path), "disk", "virtio-scsi", image_format))
    assert await machine.resize("disk", 3 * MIB) == 3 * MIB
    assert (await machine.sizes())["disk"] == 3 * MIB
    with pytest.raises(BadConfig, match="would be lost") as caught:
        await machine.resize("disk", 2 * MIB)
    assert "shrink=True" in caught.value.hint
    if image_format == "raw":
        assert path.stat().st_size == 3 * MIB
        assert await machine.resize("disk", 2 * MIB, shrink=True) == 2 * MIB
        assert path.stat().st_size == 2 * MIB
    await machine.detach("disk")


@pytest.mark.parametrize("size", [5 * MIB, MIB // 2, 5 * MIB + 7, MIB // 2 + 7])
async def test_a_disk_takes_the_size_that_its_image_was_given(machine: Machine, tmp_path: Path, size: int) -> None:
    path = make_raw(tmp_path / "image", MIB)
    await machine.attach(Disk(str(path), "disk", "virtio-scsi"))
    os.truncate(path, size)
    assert await machine.resize("disk") == sectors(size)
    assert (await machine.sizes())["disk"] == sectors(size)
    assert path.stat().st_size == size
    # Another file under the same path is ignored.
    path.unlink()
    make_raw(path, 9 * MIB)
    assert await machine.resize("disk") == sectors(size)
    await machine.detach("disk")


async def test_a_disk_does_not_take_the_size_of_an_image_that_became_empty(machine: Machine, tmp_path: Path) -> None:
    path = make_raw(tmp_path / "image", MIB)
    await machine.attach(Disk(str(path), "disk", "virtio-scsi"))
    os.truncate(path, 0)
    with pytest.raises(BadConfig, match="the image is empty"):
        await machine.resize("disk")
    assert await machine.resize("disk", MIB) == MIB
    assert path.stat().st_size == MIB
    await machine.detach("disk")


async def test_a_qcow2_image_needs_a_specified_size(machine: Machine, tmp_path: Path) -> None:
    await machine.attach(Disk(str(make_qcow2(tmp_path / "image", MIB)), "disk", "virtio-scsi", "qcow2"))
    with pytest.raises(BadConfig, match="cannot find the image's size"):
        await machine.resize("disk")
    await machine.detach("disk")


def sectors(size: int) -> int:
    """Return the size of QEMU's disk for a file of that size."""
    return -(-size // 512) * 512


@pytest.mark.parametrize("size", [None, sectors(MIB + 7)])
@pytest.mark.parametrize("shrink", [False, True])
async def test_a_file_that_ends_within_a_sector_keeps_its_length(
    machine: Machine, tmp_path: Path, size: int | None, shrink: bool
) -> None:
    path = make_raw(tmp_path / "image", MIB + 7)
    content = os.urandom(MIB + 7)
    path.write_bytes(content)
    await machine.attach(Disk(str(path), "disk", "virtio-scsi"))
    assert await machine.resize("disk", size, shrink=shrink) == sectors(MIB + 7)
    await machine.detach("disk")
    assert path.read_bytes() == content


@pytest.mark.parametrize("size", [MIB, 2 * MIB])
@pytest.mark.parametrize("known", [True, False], ids=["path", "descriptor"])
async def test_a_file_that_has_grown_from_outside_is_not_cut(
    machine: Machine, tmp_path: Path, size: int, known: bool
) -> None:
    """Without shrink=True, the file is cut neither to the disk's size nor to another size."""
    path = make_raw(tmp_path / "image", MIB)
    backing = open_disk(str(path), read_only=False)
    await machine.attach_backing(Disk(str(path) if known else "", "disk", "virtio-scsi"), backing)
    os.truncate(path, 3 * MIB)
    with pytest.raises(BadConfig, match=f"has {3 * MIB} bytes, and the data beyond {size} would be lost") as caught:
        await machine.resize("disk", size)
    assert "shrink=True" in caught.value.hint
    assert path.stat().st_size == 3 * MIB
    assert await machine.resize("disk", 4 * MIB) == 4 * MIB
    assert await machine.resize("disk", size, shrink=True) == size == path.stat().st_size
    await machine.detach("disk")


@pytest.mark.parametrize("size", [MIB + 7, 3 * MIB + 7])
async def test_a_replacement_keeps_its_length(machine: Machine, tmp_path: Path, size: int) -> None:
    await machine.attach(Disk(str(make_raw(tmp_path / "first", 2 * MIB)), "disk", "virtio-scsi"))
    second = make_raw(tmp_path / "second", size)
    assert await machine.replace("disk", str(second), shrink=True) == sectors(size)
    assert (await machine.sizes())["disk"] == sectors(size)
    assert second.stat().st_size == size
    await machine.detach("disk")


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
@pytest.mark.parametrize("size", [1 << 62, (1 << 63) - 512, 1 << 63, 1 << 80])
async def test_a_size_that_is_too_large_is_refused_clearly(
    machine: Machine, tmp_path: Path, image_format: str, size: int
) -> None:
    path = (make_raw if image_format == "raw" else make_qcow2)(tmp_path / "image", MIB)
    await machine.attach(Disk(str(path), "disk", "virtio-scsi", image_format))
    with pytest.raises(BadConfig, match=f"cannot have {size} bytes") as caught:
        await machine.resize("disk", size)
    assert caught.value.hint
    assert (await machine.sizes())["disk"] == MIB
    await machine.detach("disk")


# Block devices.


@pytest.fixture
def loop(tmp_path: Path) -> Iterator[Loop]:
    """Make a loop device of 4 MiB."""
    device = Loop(tmp_path / "device", 4 * MIB)
    yield device
    device.close()


@pytest.mark.parametrize("size", [2 * MIB, 8 * MIB, 4 * MIB])
@pytest.mark.parametrize("is_given", [True, False])
async def test_a_disk_takes_the_size_that_its_block_device_was_given(
    machine: Machine, loop: Loop, size: int, is_given: bool
) -> None:
    await machine.attach(Disk(loop.path, "disk", "virtio-scsi"))
    loop.resize(size)
    assert await machine.resize("disk", size if is_given else None) == size
    assert (await machine.sizes())["disk"] == size
    await machine.detach("disk")


@pytest.mark.parametrize("outside", [2 * MIB, 4 * MIB, 8 * MIB])
@pytest.mark.parametrize("size", [MIB, 3 * MIB, 16 * MIB])
async def test_a_block_device_cannot_be_given_another_size(
    machine: Machine, loop: Loop, outside: int, size: int
) -> None:
    await machine.attach(Disk(loop.path, "disk", "virtio-scsi"))
    loop.resize(outside)
    for shrink in (False, True):
        with pytest.raises(ConfigNotSupported, match=f"block device to {size} bytes: it has {outside} bytes") as caught:
            await machine.resize("disk", size, shrink=shrink)
        assert "without a size" in caught.value.hint
    assert (await machine.sizes())["disk"] == 4 * MIB
    await machine.detach("disk")


async def test_a_qcow2_image_on_a_block_device_has_a_size_of_its_own(machine: Machine, loop: Loop) -> None:
    make_qcow2(Path(loop.path), MIB)
    await machine.attach(Disk(loop.path, "disk", "virtio-scsi", "qcow2"))
    assert await machine.resize("disk", 64 * MIB) == 64 * MIB
    assert await machine.resize("disk", MIB, shrink=True) == MIB
    await machine.detach("disk")


async def test_a_resize_of_a_read_only_disk_or_to_a_part_of_a_sector_is_refused(
    machine: Machine, tmp_path: Path
) -> None:
    path = str(make_raw(tmp_path / "image", MIB))
    await machine.attach(Disk(path, "disk", "virtio-scsi", read_only=True))
    with pytest.raises(ConfigNotSupported, match="disk is read-only"):
        await machine.resize("disk", 2 * MIB)
    await machine.detach("disk")
    await machine.attach(Disk(path, "cd", "scsi-cd"))
    with pytest.raises(ConfigNotSupported, match="an optical disk cannot change its size"):
        await machine.resize("cd", 2 * MIB)
    await machine.detach("cd")
    await machine.attach(Disk(path, "disk", "virtio-scsi"))
    with pytest.raises(BadConfig, match="cannot have 1000 bytes"):
        await machine.resize("disk", 1000)
    await machine.detach("disk")


# Media.


async def test_an_optical_drive_may_be_empty_and_gets_media(machine: Machine, tmp_path: Path) -> None:
    first, second = make_raw(tmp_path / "first", MIB), make_raw(tmp_path / "second", 2 * MIB)
    await machine.attach(Disk("", "cd", "scsi-cd"))
    assert (await machine.sizes())["cd"] == 0
    await machine.insert_media("cd", str(first))
    assert (await machine.sizes())["cd"] == MIB
    await machine.insert_media("cd", str(second))
    assert (await machine.sizes())["cd"] == 2 * MIB
    assert set(open_images(machine.pid, tmp_path)) == {"second"}
    await machine.eject_media("cd")
    assert (await machine.sizes())["cd"] == 0
    assert set(open_images(machine.pid, tmp_path)) == set()
    await machine.eject_media("cd")
    await machine.insert_media("cd", str(first))
    await machine.detach("cd")


async def test_limits_of_an_optical_drive_stay_with_another_medium(machine: Machine, tmp_path: Path) -> None:
    """This includes limits that were set while the drive was empty."""
    await machine.attach(Disk("", "cd", "scsi-cd"))
    await machine.limit("cd", Limits(iops_read=9))
    for name in ("first", "second"):
        await machine.insert_media("cd", str(make_raw(tmp_path / name, MIB)))
        assert await throttling(machine) == [{"iops-read": 9}]
    await machine.detach("cd")


async def test_a_medium_that_qemu_cannot_open_leaves_the_old_one(machine: Machine, tmp_path: Path) -> None:
    await machine.attach(Disk(str(make_raw(tmp_path / "first", MIB)), "cd", "scsi-cd"))
    attached = await Resources.of(machine)
    (tmp_path / "broken").write_bytes(b"QFI\xfb" + bytes(1 << 16))
    with pytest.raises(QmpError, match="refused blockdev-add"):
        await machine.insert_media("cd", str(tmp_path / "broken"), format="qcow2")
    assert await Resources.of(machine) == attached
    assert (await machine.sizes())["cd"] == MIB
    await machine.detach("cd")


async def test_only_an_optical_drive_has_media(machine: Machine, tmp_path: Path) -> None:
    path = str(make_raw(tmp_path / "image", MIB))
    await machine.attach(Disk(path, "disk", "virtio-scsi"))
    with pytest.raises(BadConfig, match="has no media"):
        await machine.insert_media("disk", path)
    with pytest.raises(BadConfig, match="has no media"):
        await machine.eject_media("disk")
    await machine.detach("disk")
    with pytest.raises(BadConfig, match="has no image"):
        await machine.attach(Disk("", "disk", "virtio-scsi"))
    await machine.attach(Disk(path, "cd", "scsi-cd"))
    with pytest.raises(ConfigNotSupported, match="is an optical drive"):
        await machine.replace("cd", path)
    await machine.detach("cd")
