# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests the choice of root= with partition tables that sfdisk wrote, in raw images and in qcow2 images."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.partitions import ESP, LINUX, ROOT, USR, needs_sfdisk, partitioned
from vmspawn.errors import StartError
from vmspawn.images import qcow2
from vmspawn.images.partitions import bios_problem, root_argument

UUIDS = ["aaaaaaaa-1111-4222-8333-444444444444", "bbbbbbbb-1111-4222-8333-444444444444"]


def root_of(path: Path, *, bus: str = "virtio-blk", qcow2_image: bool = False) -> str:
    fd = os.open(path, os.O_RDONLY)
    try:

        def read_raw(offset: int, length: int) -> bytes:
            return os.pread(fd, length, offset)

        read = qcow2.Reader(fd, str(path)).read if qcow2_image else read_raw
        return root_argument(read, architecture="x86_64", bus=bus, path=str(path))
    finally:
        os.close(fd)


@needs_sfdisk
@pytest.mark.parametrize("first", [1 << 52, (1 << 55) - 1, (1 << 64) - 1])
def test_a_gpt_whose_entries_are_past_the_end_of_the_disk_has_no_partitions(tmp_path: Path, first: int) -> None:
    """A guest can write any number to its own disk."""
    path = partitioned(tmp_path / "disk", f"type={ROOT}")
    with path.open("r+b") as file:
        file.seek(512 + 72)
        file.write(first.to_bytes(8, "little"))
    assert root_of(path) == "root=/dev/vda"


@pytest.mark.parametrize(("field", "length"), [(24, 8), (40, 8)], ids=["size", "first-level table"])
def test_a_qcow2_image_with_impossible_numbers_is_refused(tmp_path: Path, field: int, length: int) -> None:
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(tmp_path / "disk"), "4M"], check=True)
    with (tmp_path / "disk").open("r+b") as file:
        file.seek(field)
        file.write(b"\xff" * length)
    with pytest.raises(StartError, match="cannot read"):
        root_of(tmp_path / "disk", qcow2_image=True)


@needs_sfdisk
@pytest.mark.parametrize(
    ("lines", "root"),
    [
        ([f"type={ESP}", f"type={ROOT}, uuid={UUIDS[0]}"], f"root=PARTUUID={UUIDS[0]}"),
        ([f"type={USR}, uuid={UUIDS[0]}", f"type={LINUX}, uuid={UUIDS[1]}"], f"mount.usr=PARTUUID={UUIDS[0]}"),
        ([f"type={USR}, uuid={UUIDS[0]}", f"type={ROOT}, uuid={UUIDS[1]}"], f"root=PARTUUID={UUIDS[1]}"),
        ([f"type={ESP}", f"type={LINUX}, uuid={UUIDS[0]}"], f"root=PARTUUID={UUIDS[0]}"),
        (
            [f'type={ROOT}, uuid={UUIDS[0]}, attrs="GUID:63"', f"type={ROOT}, uuid={UUIDS[1]}"],
            f"root=PARTUUID={UUIDS[1]}",
        ),
    ],
)
def test_the_root_is_chosen_in_a_gpt(tmp_path: Path, lines: list[str], root: str) -> None:
    assert root_of(partitioned(tmp_path / "image", *lines)) == root


@needs_sfdisk
def test_the_root_is_chosen_in_an_mbr(tmp_path: Path) -> None:
    image = partitioned(tmp_path / "image", "type=ef", "type=83", label="dos\nlabel-id: 0x1234abcd")
    assert root_of(image) == "root=PARTUUID=1234abcd-02"


@needs_sfdisk
@pytest.mark.parametrize("lines", [[f"type={ESP}"], [f"type={LINUX}", f"type={LINUX}"]])
def test_without_exactly_one_possible_root_the_user_must_name_it(tmp_path: Path, lines: list[str]) -> None:
    with pytest.raises(StartError, match="cannot choose the root") as caught:
        root_of(partitioned(tmp_path / "image", *lines))
    assert "root=" in caught.value.hint


@pytest.mark.parametrize(
    ("bus", "disk"), [("virtio-blk", "vda"), ("nvme", "nvme0n1"), ("virtio-scsi", "sda"), ("scsi-cd", "sr0")]
)
def test_an_image_without_partitions_is_the_root_as_a_whole(tmp_path: Path, bus: str, disk: str) -> None:
    (tmp_path / "image").write_bytes(bytes(4096))
    assert root_of(tmp_path / "image", bus=bus) == f"root=/dev/{disk}"


@needs_sfdisk
@pytest.mark.parametrize("options", [[], ["-c"], ["-o", "cluster_size=512"], ["-o", "cluster_size=2M"]])
def test_the_root_is_chosen_in_a_qcow2_image(tmp_path: Path, options: list[str]) -> None:
    raw = partitioned(tmp_path / "raw", f"type={ROOT}, uuid={UUIDS[0]}")
    image = tmp_path / "image"
    subprocess.run(["qemu-img", "convert", "-O", "qcow2", *options, str(raw), str(image)], check=True)
    assert root_of(image, qcow2_image=True) == f"root=PARTUUID={UUIDS[0]}"


def test_qemu_img_reads_an_empty_overlay_as_zeroes(tmp_path: Path) -> None:
    overlay, empty = tmp_path / "overlay", tmp_path / "empty"
    fd = os.open(overlay, os.O_RDWR | os.O_CREAT)
    qcow2.write_empty(fd, 5 << 30)
    assert qcow2.layout_of(fd, "overlay").size == 5 << 30
    os.close(fd)
    subprocess.run(["qemu-img", "check", "-q", str(overlay)], check=True)
    with empty.open("wb") as file:
        file.truncate(5 << 30)
    subprocess.run(["qemu-img", "compare", "-q", "-f", "qcow2", "-F", "raw", str(overlay), str(empty)], check=True)


BIOS_BOOT = "21686148-6449-6E6F-744E-656564454649"


def bios_problem_of(path: Path) -> str:
    with path.open("rb") as file:
        return bios_problem(lambda offset, length: os.pread(file.fileno(), length, offset))


def add_boot_code(path: Path) -> Path:
    with path.open("r+b") as file:
        file.write(b"\xfa\x33\xc0")
    return path


@needs_sfdisk
@pytest.mark.parametrize(
    ("label", "lines", "code", "expected"),
    [
        ("gpt", [f"type={ESP}", f"type={ROOT}"], False, "has a boot loader for UEFI only"),
        ("gpt", [f"type={ESP}"], True, "has a boot loader for UEFI only"),
        ("gpt", [f"type={ESP}", f"type={BIOS_BOOT}"], True, ""),
        ("gpt", [f"type={ESP}, attrs=LegacyBIOSBootable"], True, ""),
        ("gpt", [f"type={ROOT}"], False, "has no boot loader"),
        ("gpt", [f"type={ROOT}"], True, ""),
        ("dos", ["type=ef"], False, "has a boot loader for UEFI only"),
        ("dos", ["type=83"], False, "has no boot loader"),
        ("dos", ["type=83, bootable"], True, ""),
    ],
)
def test_an_image_that_bios_cannot_boot_is_recognized(
    tmp_path: Path, label: str, lines: list[str], code: bool, expected: str
) -> None:
    path = partitioned(tmp_path / "disk", *lines, label=label)
    assert bios_problem_of(add_boot_code(path) if code else path) == expected


@pytest.mark.parametrize("size", [0, 100, 4096])
def test_an_image_without_a_boot_sector_is_recognized(tmp_path: Path, size: int) -> None:
    (tmp_path / "disk").write_bytes(bytes(size))
    assert bios_problem_of(tmp_path / "disk") == "has no boot sector"
