# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests that boot disks and hot-plugged disks have the same rules and the same errors."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tests.conftest import make_qcow2, make_raw
from tests.machines import idle_machine
from vmspawn import Disk, Machine, MachineConfig
from vmspawn.boot.config import check_config
from vmspawn.errors import BadConfig, ConfigNotSupported, StartError, StorageExists, UsageError, VmspawnError
from vmspawn.storage.limits import Limits


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running(qemu: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Machine]:
    async with idle_machine(qemu, tmp_path_factory.mktemp("running")) as machine:
        yield machine


#: Disks that are invalid whatever their image is.
INVALID = [
    {"bus": "floppy"},
    {"name": "a\nb"},
    {"name": "x" * 256},
    {"format": "floppy"},
    {"serial": "x" * 21},
    {"serial": "no space"},
    {"serial": "mine", "bus": "nvme-ns"},
    {"discard": "never"},
    {"detect_zeroes": "always"},
    {"detect_zeroes": "unmap", "discard": "ignore"},
    {"cache": "unsafe"},
    {"aio": "native"},
    {"on_error": "panic"},
    {"on_error": "stop", "bus": "nvme"},
    {"on_error": "enospc", "bus": "nvme-ns"},
    {"thread": True, "bus": "nvme"},
    {"boot_index": -2},
    {"limits": Limits(iops=-1)},
    {"limits": Limits(iops=1, iops_read=1)},
    {"limits": Limits(burst=0.5)},
]


@pytest.mark.parametrize("options", INVALID, ids=str)
@pytest.mark.asyncio(loop_scope="module")
async def test_invalid_disks_get_the_same_errors(running: Machine, tmp_path: Path, options: dict[str, Any]) -> None:
    disk = Disk(str(make_raw(tmp_path / "disk")), **options)
    with pytest.raises(BadConfig) as plugged:
        await running.attach(disk)
    with pytest.raises(UsageError) as booted:
        check_config(MachineConfig(guest="builtin", extra_disks=(disk,)))
    assert str(booted.value) == str(plugged.value)
    assert booted.value.hint == plugged.value.hint


@pytest.mark.parametrize(
    ("options", "named"), [({"image_disk_type": "floppy"}, "bus 'floppy'"), ({"image_format": "cow"}, "format 'cow'")]
)
def test_the_image_has_the_rules_of_other_disks(options: dict[str, Any], named: str) -> None:
    with pytest.raises(UsageError, match=f"unknown .*{named}"):
        check_config(MachineConfig(image="/x.raw", **options))


def image_of_kind(folder: Path, kind: str) -> Path:
    path = folder / kind
    match kind:
        case "qcow2":
            return make_qcow2(path)
        case "empty":
            return make_raw(path, 0)
        case "vdi":
            path.write_bytes(bytes(64) + b"\x7f\x10\xda\xbe" + bytes(1 << 16))
        case _:
            return make_raw(path)
    return path


#: Images that are invalid for the disk.
UNFIT: list[tuple[str, dict[str, Any], type[VmspawnError]]] = [
    ("empty", {}, BadConfig),
    ("empty", {"bus": "virtio-scsi"}, BadConfig),
    ("raw", {"format": "qcow2"}, BadConfig),
    ("raw", {"format": "vdi"}, BadConfig),
    ("qcow2", {}, BadConfig),
    ("qcow2", {"bus": "scsi-cd"}, BadConfig),
    ("vdi", {}, BadConfig),
    ("qcow2", {"format": "qcow2", "share": True}, BadConfig),
]


@pytest.mark.parametrize(("kind", "options", "error"), UNFIT, ids=str)
@pytest.mark.asyncio(loop_scope="module")
async def test_unsuitable_images_get_the_same_errors(
    running: Machine, qemu: str, tmp_path: Path, kind: str, options: dict[str, Any], error: type[VmspawnError]
) -> None:
    path = str(image_of_kind(tmp_path, kind))
    disk = Disk(path, **options)
    with pytest.raises(error) as plugged:
        await running.attach(disk)
    with pytest.raises(StartError) as booted:
        await idle_machine(qemu, tmp_path, extra_disks=(disk,)).__aenter__()
    assert str(booted.value) == f"cannot use extra_disks={path!r}: {str(plugged.value).replace(path, 'the image')}"
    assert booted.value.hint == plugged.value.hint


#: Pairs of disks of which the second is invalid beside the first.
CONFLICTING = [
    ({"serial": "same"}, {"serial": "same"}),
    ({"serial": "other"}, {"name": "other"}),
    ({"serial": "same", "bus": "nvme"}, {"serial": "same", "bus": "nvme"}),
]


@pytest.mark.parametrize(("first", "second"), CONFLICTING, ids=str)
@pytest.mark.asyncio(loop_scope="module")
async def test_two_disks_have_two_serial_numbers(
    running: Machine, qemu: str, tmp_path: Path, first: dict[str, Any], second: dict[str, Any]
) -> None:
    one, two = Disk(str(make_raw(tmp_path / "one")), **first), Disk(str(make_raw(tmp_path / "two")), **second)
    async with idle_machine(qemu, tmp_path, extra_disks=(one,)) as machine:
        with pytest.raises(StorageExists) as plugged:
            await machine.attach(two)
    with pytest.raises(StorageExists) as booted:
        await idle_machine(qemu, tmp_path, extra_disks=(one, two)).__aenter__()
    assert str(booted.value) == str(plugged.value)
    assert "serial number" in str(plugged.value)
    # On another bus, the same serial number is allowed, because the disk has another path in the guest.
    await running.attach(one._replace(bus="virtio-scsi"))
    await running.attach(two._replace(bus="scsi-cd", serial="same"))
    for each in (one, two):
        await running.detach(each.name or Path(each.path).name)


@pytest.mark.asyncio(loop_scope="module")
async def test_some_options_are_only_for_hotplugged_disks(running: Machine, qemu: str, tmp_path: Path) -> None:
    threaded = Disk(str(make_raw(tmp_path / "threaded")), bus="virtio-scsi", thread=True)
    await running.attach(threaded)
    await running.detach("threaded")
    with pytest.raises(StartError, match="cannot have an I/O thread from boot"):
        await idle_machine(qemu, tmp_path, extra_disks=(threaded,)).__aenter__()
    with pytest.raises(UsageError, match="unknown bus 'auto'"):
        check_config(MachineConfig(guest="builtin", extra_disks=(Disk("/x", bus="auto"),)))


async def test_a_boot_disk_has_the_options_that_a_hotplugged_one_has(qemu: str, tmp_path: Path) -> None:
    """These options were once ignored for boot disks."""
    limited = Disk(str(make_raw(tmp_path / "limited")), limits=Limits(iops=100), thread=True)
    async with idle_machine(qemu, tmp_path, extra_disks=(limited,)) as machine:
        found = await machine.monitor.execute("qom-get", {"path": "/objects/limits1", "property": "limits"})
        assert found["iops-total"] == 100
        thread = await machine.monitor.execute("qom-list", {"path": "/objects"})
        assert "drive1-thread" in {each["name"] for each in thread}
        (disk,) = (each for each in machine.storage if each.name == "limited")
        assert disk.limits == Limits(iops=100)


async def test_a_namespace_is_refused_if_qemu_cannot_plug_it_in(qemu: str, tmp_path: Path) -> None:
    disk = Disk(str(make_raw(tmp_path / "disk")), bus="nvme-ns")
    async with idle_machine(qemu, tmp_path) as machine:
        if machine.storage._context.layout.namespaces.places:
            pytest.skip("this QEMU has namespaces")
        with pytest.raises(ConfigNotSupported) as plugged:
            await machine.attach(disk)
    with pytest.raises(StartError) as booted:
        await idle_machine(qemu, tmp_path, extra_disks=(disk,)).__aenter__()
    assert str(booted.value) == f"cannot use extra_disks={disk.path!r}: {plugged.value}"
