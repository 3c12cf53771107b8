# SPDX-License-Identifier: LGPL-2.1-or-later
"""Makes images of all formats, most with qemu-img, the others by hand."""

import os
import struct
import subprocess
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import MIB
from vmspawn.images.other_files import OtherFile


def make(path: Path, image_format: str, *options: str) -> Path:
    """Make an image with qemu-img."""
    command = ["qemu-img", "create", "-q", "-f", image_format, *options, path.name, str(4 * MIB)]
    subprocess.run(command, check=True, cwd=path.parent)
    return path


def patch(path: Path, offset: int, data: bytes) -> Path:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)
    return path


# Images that name other files.


def qcow2_with_a_backing_file(folder: Path) -> Path:
    make(folder / "base", "qcow2")
    return make(folder / "image", "qcow2", "-b", "base", "-F", "qcow2")


def qcow2_with_a_data_file(folder: Path) -> Path:
    return make(folder / "image", "qcow2", "-o", "data_file=data")


def vmdk_delta(folder: Path) -> Path:
    make(folder / "base", "vmdk")
    return make(folder / "image", "vmdk", "-b", "base", "-F", "vmdk")


def vmdk_delta_without_a_hint(folder: Path) -> Path:
    path = vmdk_delta(folder)
    path.write_bytes(path.read_bytes().replace(b"parentFileNameHint", b"anotherFileNameHin"))
    return path


def vmdk_delta_hinted_where_qemu_looks(folder: Path) -> Path:
    """Make an image whose header points to a descriptor that QEMU does not read."""
    path = vmdk_delta(folder)
    clean = b"# Disk DescriptorFile\nversion=1\nparentCID=ffffffff\n"
    path.write_bytes(path.read_bytes().ljust(MIB, b"\0") + clean.ljust(512, b"\0"))
    return patch(path, 28, struct.pack("<QQ", MIB // 512, 1))


def vmdk_flat(folder: Path) -> Path:
    return make(folder / "image", "vmdk", "-o", "subformat=monolithicFlat")


def vmdk_split(folder: Path) -> Path:
    return make(folder / "image", "vmdk", "-o", "subformat=twoGbMaxExtentSparse")


def vmdk_without_a_capacity(folder: Path) -> Path:
    """Make a sparse extent without a capacity, which QEMU reads as a descriptor of other extents."""
    return patch(make(folder / "image", "vmdk"), 12, bytes(8))


def vmdk_of_two_extents(folder: Path) -> Path:
    path = make(folder / "image", "vmdk")
    more = b'RW 8192 SPARSE "image"\nRW 8192 FLAT "more" 0\n'
    return patch(path, 512 + path.read_bytes()[512:].index(b"RW "), more)


def vdi_differencing(folder: Path) -> Path:
    return patch(make(folder / "image", "vdi"), 0x4C, struct.pack("<I", 4))


def vdi_linked(folder: Path) -> Path:
    return patch(make(folder / "image", "vdi"), 0x1A8, uuid.uuid4().bytes)


def vdi_with_a_parent(folder: Path) -> Path:
    return patch(make(folder / "image", "vdi"), 0x1B8, uuid.uuid4().bytes)


def vhdx_metadata(path: Path) -> tuple[int, int]:
    """Return the offset of an image's metadata, found by its signature, and the number of items."""
    data = path.read_bytes()
    region = next(at for at in range(MIB, len(data), 1 << 16) if data.startswith(b"metadata", at))
    return region, int.from_bytes(data[region + 10 : region + 12], "little")


def vhdx_differencing(folder: Path) -> Path:
    path = make(folder / "image", "vhdx")
    data = path.read_bytes()
    region, _ = vhdx_metadata(path)
    entry = data.index(uuid.UUID("caa16737-fa36-4d43-b3b6-33f0aa44e76b").bytes_le, region)
    offset = int.from_bytes(data[entry + 16 : entry + 20], "little")
    return patch(path, region + offset + 4, struct.pack("<I", 2))


def vhdx_with_a_parent_locator(folder: Path) -> Path:
    path = make(folder / "image", "vhdx")
    region, count = vhdx_metadata(path)
    key, value = "relative_path".encode("utf-16-le"), ".\\parent.vhdx".encode("utf-16-le")
    pair = struct.pack("<IIHH", 32, 32 + len(key), len(key), len(value))
    locator = bytes(16) + struct.pack("<HH", 0, 1) + pair + key + value
    kind = uuid.UUID("a8d35f2d-b30b-454d-abf7-d3d84834ab0c").bytes_le
    patch(path, region + 0xF0000, locator)
    patch(path, region + 32 + count * 32, kind + struct.pack("<IIII", 0xF0000, len(locator), 4, 0))
    return patch(path, region + 10, struct.pack("<H", count + 1))


#: Images that name other files, by format, with the named files.
OTHERS: dict[str, list[tuple[Callable[[Path], Path], list[OtherFile]]]] = {
    "raw": [],
    "qcow2": [
        (qcow2_with_a_backing_file, [OtherFile("backing file", "base")]),
        (qcow2_with_a_data_file, [OtherFile("data file", "data")]),
    ],
    "vmdk": [
        (vmdk_delta, [OtherFile("parent", "base")]),
        (vmdk_delta_without_a_hint, [OtherFile("parent")]),
        (vmdk_delta_hinted_where_qemu_looks, [OtherFile("parent", "base")]),
        (vmdk_flat, [OtherFile("extent", "image-flat")]),
        (vmdk_split, [OtherFile("extent", "image-s001")]),
        (vmdk_without_a_capacity, [OtherFile("extent", "image")]),
        (vmdk_of_two_extents, [OtherFile("extent", "image"), OtherFile("extent", "more")]),
    ],
    "vdi": [
        (vdi_differencing, [OtherFile("parent")]),
        (vdi_linked, [OtherFile("parent")]),
        (vdi_with_a_parent, [OtherFile("parent")]),
    ],
    "vhdx": [
        (vhdx_differencing, [OtherFile("parent")]),
        (vhdx_with_a_parent_locator, [OtherFile("parent", ".\\parent.vhdx")]),
    ],
}


# Images that cannot be checked.


def qcow2_of_the_future(folder: Path) -> Path:
    return patch(make(folder / "image", "qcow2"), 4, struct.pack(">I", 4))


def vmdk_extent(folder: Path) -> Path:
    return vmdk_split(folder).with_name("image-s001")


def vmdk_of_esx(folder: Path) -> Path:
    return patch(make(folder / "image", "raw"), 0, b"COWD\1\0\0\0")


def vmdk_of_a_newer_esx(folder: Path) -> Path:
    return patch(make(folder / "image", "raw"), 0, struct.pack("<Q", 0xCAFEBABE))


def vmdk_with_a_huge_descriptor(folder: Path) -> Path:
    return patch(make(folder / "image", "vmdk"), 36, struct.pack("<Q", 1 << 63))


def vdi_of_another_version(folder: Path) -> Path:
    return patch(make(folder / "image", "vdi"), 0x44, struct.pack("<I", 1))


def vdi_cut_off(folder: Path) -> Path:
    path = make(folder / "image", "vdi")
    os.truncate(path, 100)
    return path


def vhdx_cut_off(folder: Path) -> Path:
    path = make(folder / "image", "vhdx")
    os.truncate(path, 1 << 16)
    return path


def vhdx_without_metadata(folder: Path) -> Path:
    path = make(folder / "image", "vhdx")
    return patch(path, vhdx_metadata(path)[0], bytes(8))


def vhdx_without_parameters(folder: Path) -> Path:
    path = make(folder / "image", "vhdx")
    return patch(path, vhdx_metadata(path)[0] + 10, bytes(2))


#: Images that cannot be checked for other files. Each function's name begins with the format.
UNCHECKABLE: list[Callable[[Path], Path]] = [
    qcow2_of_the_future,
    vmdk_extent,
    vmdk_of_esx,
    vmdk_of_a_newer_esx,
    vmdk_with_a_huge_descriptor,
    vdi_of_another_version,
    vdi_cut_off,
    vhdx_cut_off,
    vhdx_without_metadata,
    vhdx_without_parameters,
]


# Images in container formats.


def made_by_qemu(image_format: str, *options: str) -> Callable[[Path], Path]:
    return lambda folder: make(folder / "image", image_format, *options)


def made_of(data: bytes, offset: int = 0) -> Callable[[Path], Path]:
    return lambda folder: patch(make(folder / "image", "raw"), offset, data)


def old_fixed_vhd(folder: Path) -> Path:
    """Make a fixed VHD with the footer of 511 bytes that Virtual PC wrote before 2004."""
    path = make(folder / "image", "vpc", "-o", "subformat=fixed")
    os.truncate(path, path.stat().st_size - 1)
    return path


def damaged_vhd(folder: Path) -> Path:
    """Make a dynamic VHD without the copy of the footer at the start. QEMU finds the footer at the end."""
    return patch(make(folder / "image", "vpc"), 0, bytes(512))


#: Images by format. Parentheses distinguish images of the same format.
CONTAINERS: dict[str, Callable[[Path], Path]] = {
    "qcow2": made_by_qemu("qcow2"),
    "qcow": made_by_qemu("qcow"),
    "qed": made_by_qemu("qed"),
    "vdi": made_by_qemu("vdi"),
    "vhdx": made_by_qemu("vhdx"),
    "parallels": made_by_qemu("parallels"),
    "parallels (old)": made_of(b"WithoutFreeSpace\2\0\0\0"),
    "vpc": made_by_qemu("vpc"),
    "vpc (fixed)": made_by_qemu("vpc", "-o", "subformat=fixed"),
    "vpc (fixed, old)": old_fixed_vhd,
    "vpc (damaged)": damaged_vhd,
    "vmdk": made_by_qemu("vmdk"),
    "vmdk (stream)": made_by_qemu("vmdk", "-o", "subformat=streamOptimized"),
    "vmdk (flat)": vmdk_flat,
    "vmdk (split)": vmdk_split,
    "vmdk (extent)": vmdk_extent,
    "vmdk (ESX)": vmdk_of_esx,
    "vmdk (newer ESX)": vmdk_of_a_newer_esx,
    "vmdk (comments first)": made_of(b"# a comment\r\n\r\nversion = 1\r\n"),
    "bochs": made_of(b"Bochs Virtual HD Image\0Redolog\0"),
    "cloop": made_of(b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop file=$0 && mount -r -t iso9660 /dev/cloop $1\n"),
    "dmg": made_of(b"koly" + struct.pack(">II", 4, 512), 4 * MIB - 512),
}


# Raw disks.


def partitioned(label: str) -> Callable[[Path], Path]:
    def partition(folder: Path) -> Path:
        path = make(folder / "image", "raw")
        run("sfdisk", "--quiet", str(path), stdin=f"label: {label}\nstart=2048, size=2048\n")
        return path

    return partition


def with_a_file_system(program: str, *options: str) -> Callable[[Path], Path]:
    def make_file_system(folder: Path) -> Path:
        path = make(folder / "image", "raw")
        run(program, *options, str(path))
        return path

    return make_file_system


def run(program: str, *arguments: str, stdin: str = "") -> None:
    environment = {**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}
    try:
        subprocess.run([program, *arguments], input=stdin, text=True, check=True, env=environment, capture_output=True)
    except FileNotFoundError:
        pytest.skip(f"{program} is not installed")


RAW: dict[str, Callable[[Path], Path]] = {
    "empty": made_by_qemu("raw"),
    "mbr": partitioned("dos"),
    "gpt": partitioned("gpt"),
    "ext4": with_a_file_system("mkfs.ext4", "-q"),
    "vfat": with_a_file_system("mkfs.vfat"),
    "swap": with_a_file_system("mkswap"),
    # Guests that encrypt their disks write these.
    "luks": made_of(b"LUKS\xba\xbe\0\1aes"),
    "luks2": made_of(b"LUKS\xba\xbe\0\2\0\0\0\0\0\0\x40\0"),
    "iso": made_of(b"\1CD001\1\0LINUX", 0x8000),
    "hybrid iso": lambda folder: patch(partitioned("dos")(folder), 0x8000, b"\1CD001\1\0LINUX"),
    "script": made_of(b"#!/bin/sh\nset -e\n# version 1\nversion_of() { :; }\n"),
    "text": made_of(b"This disk has version=1 of the data.\n"),
    # A disk that ends with the letters of a footer, without its checksum.
    "cookie": made_of(b"conectix" + bytes(504), 4 * MIB - 512),
    "short": lambda folder: patch(folder / "image", 0, b"QF"),
}
