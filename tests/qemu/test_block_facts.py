# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests the facts of docs/qemu.md about block nodes, locks, descriptor sets, the pivot and media with a bare QEMU."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import MIB, make_qcow2, make_raw
from tests.qemu.bare_qemu import Monitor, bare

#: A device on node `n0` for each bus of disks.
DEVICES: dict[str, dict[str, Any]] = {
    "virtio-blk-pci": {"drive": "n0", "bus": "port0", "addr": "0x0"},
    "nvme": {"drive": "n0", "bus": "port0", "addr": "0x0", "serial": "x"},
    "scsi-hd": {"drive": "n0", "bus": "scsi0.0", "scsi_id": 0, "lun": 0},
}


@pytest.fixture
def q35(qemu: str) -> Iterator[Monitor]:
    with bare(qemu, "q35") as monitor:
        yield monitor


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return make_raw(tmp_path / "image", MIB)


def plug(monitor: Monitor, driver: str, **changed: Any) -> None:
    """Plug in a device."""
    monitor.succeed("device_add", id="d0", driver=driver, **{**DEVICES[driver], **changed})


def pass_file(monitor: Monitor, path: Path, flags: int, number: int) -> None:
    """Add an open file to a descriptor set."""
    fd = os.open(path, flags)
    try:
        monitor.succeed("add-fd", fdset_id=number, fds=[fd])
    finally:
        os.close(fd)


# Locks, and the remains of failures.


def test_a_raw_image_is_locked_by_the_device_and_a_qcow2_image_by_its_node(qemu: str, image: Path) -> None:
    qcow2 = make_qcow2(image.with_suffix(".qcow2"), MIB)
    with bare(qemu, "q35") as first, bare(qemu, "q35") as second:
        for monitor in (first, second):
            monitor.add_file(image, "n0")
        plug(first, "scsi-hd")
        assert second.fail("device_add", id="d0", driver="scsi-hd", **DEVICES["scsi-hd"]) == (
            'Failed to get "write" lock'
        )
        # The node still exists, and is not in use.
        second.succeed("blockdev-del", node_name="n0")

        for monitor in (first, second):
            monitor.add_file(qcow2, "file")
        first.succeed("blockdev-add", driver="qcow2", node_name="q", file="file")
        refusal = second.fail("blockdev-add", driver="qcow2", node_name="q", file="file")
        assert refusal == 'Failed to get "write" lock'


def test_a_blockdev_add_that_fails_leaves_nothing(q35: Monitor, image: Path) -> None:
    q35.add_file(image, "n0")
    before = set(q35.nodes())
    assert "qcow2" in q35.fail("blockdev-add", driver="qcow2", node_name="q", file="n0")
    assert set(q35.nodes()) == before
    q35.succeed("blockdev-del", node_name="n0")


def test_an_unknown_node_cannot_be_removed(q35: Monitor) -> None:
    assert q35.fail("blockdev-del", node_name="n0") == "Failed to find node with node-name='n0'"


@pytest.mark.parametrize("driver", ["virtio-blk-pci", "scsi-hd"])
def test_a_device_add_that_fails_releases_its_node(q35: Monitor, image: Path, driver: str) -> None:
    """QEMU 7.2 keeps the node of an nvme device forever."""
    q35.add_file(image, "n0", read_only=False)
    q35.fail("device_add", id="d0", driver=driver, **DEVICES[driver], physical_block_size=3)
    q35.succeed("blockdev-del", node_name="n0")


def test_a_backing_file_that_the_header_names_is_not_opened(q35: Monitor, tmp_path: Path) -> None:
    path = tmp_path / "delta.qcow2"
    base = ("-b", str(tmp_path / "none"), "-F", "raw", "-u")
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *base, str(path), str(MIB)], check=True)
    q35.add_file(path, "n0")
    assert "No such file" in q35.fail("blockdev-add", driver="qcow2", node_name="q", file="n0")
    q35.succeed("blockdev-add", driver="qcow2", node_name="q", file="n0", backing=None)


def test_a_size_is_rounded_up_to_sectors(q35: Monitor, tmp_path: Path) -> None:
    (tmp_path / "odd").write_bytes(bytes(1000))
    q35.add_file(tmp_path / "odd", "n0")
    assert q35.nodes()["n0"]["image"]["virtual-size"] == 1024
    assert (tmp_path / "odd").stat().st_size == 1000


# Descriptor sets.


@pytest.mark.parametrize("read_only", [False, True])
def test_a_node_needs_a_descriptor_of_exactly_its_access_mode(q35: Monitor, image: Path, read_only: bool) -> None:
    fitting, other = (os.O_RDONLY, os.O_RDWR) if read_only else (os.O_RDWR, os.O_RDONLY)
    node: dict[str, Any] = {"driver": "file", "node_name": "n0", "filename": "/dev/fdset/7", "read_only": read_only}
    pass_file(q35, image, other, 7)
    q35.fail("blockdev-add", **node)
    pass_file(q35, image, fitting, 7)
    q35.succeed("blockdev-add", **node)


def test_a_set_may_be_removed_when_its_node_exists(q35: Monitor, image: Path) -> None:
    """The node has a duplicate. QEMU 7.2 removes a set only while the guest runs, and needs the command again then."""
    pass_file(q35, image, os.O_RDWR, 7)
    q35.succeed("blockdev-add", driver="file", node_name="n0", filename="/dev/fdset/7")
    q35.succeed("remove-fd", fdset_id=7)
    image.unlink()
    plug(q35, "virtio-blk-pci")
    q35.succeed("cont")
    if q35.succeed("query-fdsets"):
        q35.succeed("remove-fd", fdset_id=7)
    assert all(not each["fds"] for each in q35.succeed("query-fdsets"))
    assert q35.nodes()["n0"]["image"]["virtual-size"] == MIB


def test_an_unknown_set_cannot_be_removed(q35: Monitor) -> None:
    assert q35.fail("remove-fd", fdset_id=7) == "File descriptor named 'fdset-id:7' not found"


def test_a_descriptor_with_o_sync_is_refused(q35: Monitor, image: Path) -> None:
    pass_file(q35, image, os.O_RDWR | os.O_SYNC, 7)
    assert "dup" in q35.fail("blockdev-add", driver="file", node_name="n0", filename="/dev/fdset/7")


def test_o_nonblock_is_cleared_on_the_callers_descriptor(q35: Monitor, image: Path) -> None:
    """QEMU receives the same open file description."""
    fd = os.open(image, os.O_RDWR | os.O_NONBLOCK)
    try:
        assert not os.get_blocking(fd)
        q35.succeed("add-fd", fdset_id=7, fds=[fd])
        assert os.get_blocking(fd)
    finally:
        os.close(fd)


def test_each_driver_takes_its_kind_of_file(q35: Monitor, image: Path) -> None:
    refusal = q35.fail("blockdev-add", driver="file", node_name="n0", filename="/dev/null")
    assert refusal == "'file' driver requires '/dev/null' to be a regular file"
    refusal = q35.fail("blockdev-add", driver="host_device", node_name="n0", filename=str(image))
    assert refusal == f"'host_device' driver requires '{image}' to be either a character or block device"


# The pivot: the throttle filter between a disk's device and its image.

PIVOT: dict[str, Any] = {"driver": "throttle", "node-name": "pivot", "throttle-group": "group"}


def add_pivot(monitor: Monitor, path: Path, driver: str) -> None:
    """Plug in a device on a throttle filter."""
    monitor.succeed("object-add", qom_type="throttle-group", id="group")
    monitor.add_file(path, "n0")
    monitor.succeed("blockdev-add", **PIVOT, file="n0")
    plug(monitor, driver, drive="pivot")


@pytest.mark.parametrize("driver", list(DEVICES))
def test_another_image_or_errors_are_put_under_the_pivot(q35: Monitor, image: Path, driver: str) -> None:
    """The old image is closed while the device exists. The pivot's `file` shows the new one."""
    add_pivot(q35, image, driver)
    assert str(image) in q35.open_files()

    second = make_raw(image.with_name("second"), MIB)
    q35.add_file(second, "n1")
    q35.succeed("blockdev-reopen", options=[{**PIVOT, "file": "n1"}])
    q35.succeed("blockdev-del", node_name="n0")
    assert str(image) not in q35.open_files()
    assert str(second) in q35.nodes()["pivot"]["file"]

    q35.succeed("blockdev-add", driver="null-co", node_name="gone", size=MIB, read_zeroes=True)
    errors = [{"event": "none", "errno": 5, "once": False}]
    q35.succeed("blockdev-add", driver="blkdebug", node_name="errors", image="gone", inject_error=errors)
    q35.succeed("blockdev-reopen", options=[{**PIVOT, "file": "errors"}])
    q35.succeed("blockdev-del", node_name="n1")
    assert str(second) not in q35.open_files()
    assert "blkdebug" in q35.nodes()["pivot"]["file"]


@pytest.mark.parametrize("driver", ["virtio-blk-pci", "scsi-hd"])
def test_a_disk_takes_another_size_through_the_pivot(q35: Monitor, image: Path, driver: str) -> None:
    add_pivot(q35, image, driver)
    for size in (2 * MIB, MIB):
        q35.succeed("block_resize", node_name="pivot", size=size)
        assert q35.nodes()["pivot"]["image"]["virtual-size"] == size
        assert image.stat().st_size == size


def test_an_nvme_disk_keeps_its_size(q35: Monitor, image: Path) -> None:
    add_pivot(q35, image, "nvme")
    refusal = q35.fail("block_resize", node_name="pivot", size=2 * MIB)
    assert refusal.startswith("Permission conflict on node 'pivot': permissions 'resize' are both required")


def test_a_read_only_disk_keeps_its_size(q35: Monitor, image: Path) -> None:
    q35.add_file(image, "n0", read_only=True)
    plug(q35, "virtio-blk-pci")
    assert q35.fail("block_resize", node_name="n0", size=2 * MIB) == "Image is read-only"


def test_the_limits_of_a_group_can_be_changed(q35: Monitor, image: Path) -> None:
    add_pivot(q35, image, "virtio-blk-pci")
    limits: dict[str, Any] = {"path": "/objects/group", "property": "limits"}
    q35.succeed("qom-set", **limits, value={"iops-total": 50})
    assert q35.succeed("qom-get", **limits)["iops-total"] == 50


# Queries that a manager uses.


def test_query_block_has_the_path_of_virtio_blk_and_the_id_of_others(q35: Monitor, image: Path) -> None:
    known = {"virtio-blk-pci": "/machine/peripheral/d0/virtio-backend", "nvme": "d0", "scsi-hd": "d0"}
    for number, (driver, expected) in enumerate(known.items()):
        q35.add_file(make_raw(image.with_name(f"image{number}"), MIB), "n0")
        plug(q35, driver)
        for command in ("query-block", "query-blockstats"):
            (found,) = q35.succeed(command)
            assert found["qdev"] == expected
        q35.succeed("device_del", id="d0")
        q35.succeed("system_reset")
        while q35.event("DEVICE_DELETED").get("device") != "d0":
            pass
        q35.succeed("blockdev-del", node_name="n0")


def test_a_node_describes_itself_down_to_the_descriptor_set(q35: Monitor, image: Path) -> None:
    """A manager finds the pivot's image by that, because 7.2 does not name a node's children."""
    pass_file(q35, image, os.O_RDWR, 7)
    q35.succeed("object-add", qom_type="throttle-group", id="group")
    q35.succeed("blockdev-add", driver="file", node_name="n0", filename="/dev/fdset/7")
    q35.succeed("blockdev-add", **PIVOT, file="n0")
    assert q35.nodes()["n0"]["file"] == "/dev/fdset/7"
    assert '/dev/fdset/7"' in q35.nodes()["pivot"]["file"]


def test_devices_and_objects_are_listed_by_id(q35: Monitor, image: Path) -> None:
    add_pivot(q35, image, "scsi-hd")
    for path, name in (("/machine/peripheral", "d0"), ("/machine/peripheral", "port0"), ("/objects", "group")):
        assert name in {each["name"] for each in q35.succeed("qom-list", path=path)}


# Media.


def test_a_medium_moves_only_while_the_tray_is_open(q35: Monitor, image: Path) -> None:
    """The refusal is recognised by its text, because QEMU's error class is the same for all reasons."""
    q35.add_file(image, "n0", read_only=True)
    q35.succeed("device_add", id="d0", driver="scsi-cd", bus="scsi0.0", scsi_id=0, lun=0, drive="n0")
    reply = q35.run("blockdev-remove-medium", id="d0")
    assert reply["error"]["class"] == "GenericError"
    assert "is not open" in reply["error"]["desc"]

    q35.succeed("blockdev-open-tray", id="d0")
    assert q35.event("DEVICE_TRAY_MOVED") == {"device": "", "id": "d0", "tray-open": True}
    q35.succeed("blockdev-remove-medium", id="d0")
    q35.succeed("blockdev-del", node_name="n0")
    q35.add_file(make_raw(image.with_name("second"), MIB), "n1", read_only=True)
    q35.succeed("blockdev-insert-medium", id="d0", node_name="n1")
    q35.succeed("blockdev-close-tray", id="d0")
    assert q35.event("DEVICE_TRAY_MOVED") == {"device": "", "id": "d0", "tray-open": False}
    (found,) = q35.succeed("query-block")
    assert found["inserted"]["node-name"] == "n1"
    assert found["qdev"] == "d0"
    assert "is not open" in q35.fail("blockdev-remove-medium", id="d0")


def test_a_drive_that_was_plugged_in_empty_keeps_its_media(q35: Monitor, image: Path) -> None:
    """Therefore vmspawn plugs in a drive with a medium, and then removes the medium."""
    q35.succeed("device_add", id="d0", driver="scsi-cd", bus="scsi0.0", scsi_id=0, lun=0)
    q35.add_file(image, "n0", read_only=True)
    q35.succeed("blockdev-open-tray", id="d0")
    q35.succeed("blockdev-insert-medium", id="d0", node_name="n0")
    q35.succeed("blockdev-close-tray", id="d0")
    q35.succeed("device_del", id="d0")
    assert q35.event("DEVICE_DELETED")["device"] == "d0"
    assert q35.fail("blockdev-del", node_name="n0").endswith(" n0 is in use")
