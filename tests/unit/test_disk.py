# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests the checks of a disk's name, serial number, format and descriptor."""

import fcntl
import os
import socket
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import make_qcow2, make_raw
from vmspawn.errors import BadConfig, SystemFailure, UsageError
from vmspawn.storage import formats
from vmspawn.storage.backing import inspect_descriptor, open_disk
from vmspawn.storage.disk import DISK_NAME_MAX, Disk, check_disk_name, check_serial, parse_extra_drive, serial_for


@pytest.mark.parametrize("name", ["disk", "a", "x" * 20, "data-1.raw", "A_b.C-9"])
def test_a_short_plain_name_is_its_own_serial(name: str) -> None:
    assert serial_for(name) == name


def test_the_serial_of_a_name_with_a_space_is_a_hash() -> None:
    # printf %s 'my disk' | sha256sum | cut -c1-20
    assert serial_for("my disk") == "514d464627a195887561"


@given(st.text(min_size=1, max_size=300))
def test_every_name_gives_a_serial_that_every_bus_can_carry(name: str) -> None:
    assert check_serial(serial_for(name))


@pytest.mark.parametrize("name", ["", "a\nb", "\x00", "x" * (DISK_NAME_MAX + 1)])
def test_invalid_names_are_refused(name: str) -> None:
    with pytest.raises(BadConfig, match="invalid disk name"):
        check_disk_name(name)


@pytest.mark.parametrize("name", ["disk", "pool:volume", "two words", "größe", "a/b", "x" * DISK_NAME_MAX])
def test_valid_names_are_accepted(name: str) -> None:
    assert check_disk_name(name) == name


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemFailure, match="No such file or directory"):
        open_disk(str(tmp_path / "none"), read_only=False)


def test_a_directory_is_not_a_disk(tmp_path: Path) -> None:
    for read_only in (True, False):
        with pytest.raises(BadConfig, match="is a directory"):
            open_disk(str(tmp_path), read_only=read_only)


def test_a_fifo_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(BadConfig, match="is a pipe"):
        open_disk(str(tmp_path / "fifo"), read_only=False)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (os.O_WRONLY, "for writing only"),
        (os.O_PATH, "O_PATH only"),
        (os.O_RDWR | os.O_SYNC, "O_SYNC"),
        (os.O_RDWR | os.O_DSYNC, "O_SYNC"),
    ],
)
def test_descriptors_that_qemu_could_not_use_are_refused(tmp_path: Path, flags: int, message: str) -> None:
    fd = os.open(make_raw(tmp_path / "disk"), flags)
    try:
        with pytest.raises(BadConfig, match=message):
            inspect_descriptor(fd)
        fcntl.fcntl(fd, fcntl.F_GETFD)  # the caller's descriptor is still open
    finally:
        os.close(fd)


def test_a_pipe_and_a_socket_are_refused() -> None:
    reader, writer = os.pipe()
    with socket.socket() as endpoint:
        for fd, kind in ((reader, "pipe"), (endpoint.fileno(), "socket")):
            with pytest.raises(BadConfig, match=f"is a {kind}"):
                inspect_descriptor(fd)
    os.close(reader)
    os.close(writer)


@pytest.mark.parametrize(("flags", "writable"), [(os.O_RDONLY, False), (os.O_RDWR, True)])
def test_the_descriptor_decides_whether_the_disk_is_writable(tmp_path: Path, flags: int, writable: bool) -> None:
    backing = inspect_descriptor(os.open(make_raw(tmp_path / "disk", 12345), flags))
    assert (backing.is_writable, backing.size, backing.is_block_device) == (writable, 12345, False)
    backing.close()


def test_a_writable_descriptor_can_become_a_read_only_disk(tmp_path: Path) -> None:
    backing = inspect_descriptor(os.open(make_raw(tmp_path / "disk"), os.O_RDWR), read_only=True)
    assert not backing.is_writable
    assert fcntl.fcntl(backing.fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
    assert not os.get_inheritable(backing.fd)
    backing.close()


def test_direct_access_is_cleared_for_a_cached_node(tmp_path: Path) -> None:
    path = make_raw(tmp_path / "disk")
    try:
        fd = os.open(path, os.O_RDWR | os.O_DIRECT)
    except OSError:
        pytest.skip("this file system has no O_DIRECT")
    backing = inspect_descriptor(fd)
    assert not fcntl.fcntl(backing.fd, fcntl.F_GETFL) & os.O_DIRECT
    backing.close()


def test_no_format_means_raw_but_never_for_an_image_that_looks_like_qcow2(tmp_path: Path) -> None:
    raw = open_disk(str(make_raw(tmp_path / "raw")), read_only=True)
    assert formats.choose_format(raw, None, what="raw") == "raw"
    raw.close()
    qcow2 = open_disk(str(make_qcow2(tmp_path / "qcow2")), read_only=True)
    with pytest.raises(BadConfig, match="looks like qcow2"):
        formats.choose_format(qcow2, None, what="qcow2")
    assert formats.choose_format(qcow2, "qcow2", what="qcow2") == "qcow2"
    assert formats.choose_format(qcow2, "raw", what="qcow2") == "raw"
    qcow2.close()


def test_a_specified_format_must_be_the_images(tmp_path: Path) -> None:
    raw = open_disk(str(make_raw(tmp_path / "raw")), read_only=True)
    with pytest.raises(BadConfig, match="is not in qcow2 format"):
        formats.choose_format(raw, "qcow2", what="raw")
    raw.close()


def test_an_image_with_a_backing_file_is_refused(tmp_path: Path) -> None:
    import subprocess

    make_raw(tmp_path / "base")
    overlay = tmp_path / "overlay"
    command = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", str(tmp_path / "base"), str(overlay)]
    subprocess.run(command, check=True)
    backing = open_disk(str(overlay), read_only=True)
    with pytest.raises(BadConfig, match="has a backing file"):
        formats.choose_format(backing, "qcow2", what="overlay")
    backing.close()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/a/disk", Disk("/a/disk", "disk")),
        ("qcow2:/a/disk", Disk("/a/disk", "disk", format="qcow2")),
        ("nvme:/a/disk", Disk("/a/disk", "disk", bus="nvme")),
        ("raw:virtio-scsi:/a/disk", Disk("/a/disk", "disk", bus="virtio-scsi", format="raw")),
        ("/a/b:c", Disk("/a/b:c", "b:c")),
        ("virtio-scsi:raw:/a/disk", Disk("/a/disk", "disk", bus="virtio-scsi", format="raw")),
        ("nvme:nvme:x", Disk(os.path.abspath("nvme:x"), "nvme:x", bus="nvme")),
        ("scsi-cd:/a/qcow2:x", Disk("/a/qcow2:x", "qcow2:x", bus="scsi-cd")),
    ],
)
def test_extra_disk_takes_a_format_and_a_bus_in_front_of_the_path(text: str, expected: Disk) -> None:
    assert parse_extra_drive(text) == expected


@pytest.mark.parametrize("text", ["", "qcow2:", "raw:nvme:"])
def test_extra_disk_without_a_path_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="names no path"):
        parse_extra_drive(text)
