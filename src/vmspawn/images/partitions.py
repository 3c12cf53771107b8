# SPDX-License-Identifier: LGPL-2.1-or-later
"""Reads an image's partition table, to choose the kernel's root= argument and to predict whether BIOS can boot.

A kernel that QEMU starts directly gets no root= from a boot loader. vmspawn chooses the same root as systemd-vmspawn:

1. the partition whose type marks the root, or /usr, of this architecture (uapi-group.org, Discoverable Partitions
   Specification),
2. else the only partition with Linux's generic type,
3. else, if the image has no partitions, the whole disk.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import NamedTuple

from ..errors import StartError

_ROOT_TYPES = {"x86_64": "4f68bce3-e8cd-4db1-96e7-fbcaf984b709", "aarch64": "b921b045-1df0-41c3-af44-4c6f280d3fae"}
_USR_TYPES = {"x86_64": "8484680c-9521-48c6-9c11-b0720656f69e", "aarch64": "b0e01050-ee5f-4390-949a-9101b17104e9"}
_LINUX_TYPE = "0fc63daf-8483-4772-8e79-3d69d8477de4"

_ESP_TYPE = "c12a7328-f81f-11d2-ba4b-00a0c93ec93b"
_BIOS_BOOT_TYPE = "21686148-6449-6e6f-744e-656564454649"
_MBR_ESP = 0xEF

#: The attribute of a partition that BIOS boots, through code such as syslinux's gptmbr.bin (UEFI, 5.3.3).
_LEGACY_BOOT = 1 << 2

#: The bytes of code at the start of a boot sector.
_BOOT_CODE = 440

#: The attribute of a partition that is not to be mounted automatically.
_NO_AUTO = 1 << 63

# The header of a GPT (UEFI specification, 5.3.2): signature, …, first LBA of the entries, their number and their size.
_GPT_HEADER = struct.Struct("<8s64xQII")
_GPT_ENTRY = struct.Struct("<16s16s16xQ")
_ENTRIES_MAX = 1 << 20
#: The largest offset that system calls accept. A guest can write any number into its partition table.
_OFFSET_MAX = (1 << 63) - _ENTRIES_MAX - 1

# An MBR: the disk's signature at 440, four entries at 446 (the type is the fifth byte of each), 55 AA at the end.
_MBR_ENTRIES = 446
_MBR_LINUX = 0x83
_MBR_PROTECTIVE = 0xEE

#: The kernel's name of the first disk on each bus.
_FIRST_DISK = {"virtio-blk": "/dev/vda", "nvme": "/dev/nvme0n1", "virtio-scsi": "/dev/sda", "scsi-cd": "/dev/sr0"}

Reader = Callable[[int, int], bytes]


class _Partition(NamedTuple):
    type: str
    uuid: str
    attributes: int


def root_argument(read: Reader, *, architecture: str, bus: str, path: str) -> str:
    """Return the kernel argument that names the guest's root. `read` takes an offset and a length in the image.

    Raises StartError if no partition, or more than one, can be the root.
    """
    sector = 2048 if bus == "scsi-cd" else 512
    partitions = [each for each in _gpt(read, sector) if not each.attributes & _NO_AUTO]
    for name, partition_type in (("root", _ROOT_TYPES[architecture]), ("mount.usr", _USR_TYPES[architecture])):
        if found := next((each for each in partitions if each.type == partition_type), None):
            return f"{name}=PARTUUID={found.uuid}"
    generic = [each.uuid for each in partitions if each.type == _LINUX_TYPE]
    if not partitions:
        mbr = _mbr(read)
        if mbr is None:
            return f"root={_FIRST_DISK[bus]}"
        generic = mbr
    if len(generic) == 1:
        return f"root=PARTUUID={generic[0]}"
    problem = "more than one partition that could be" if generic else "no partition that is"
    raise StartError(
        f"cannot choose the root of {path}: it has {problem} the guest's root",
        hint="pass a kernel argument: root=…",
    )


def bios_problem(read: Reader) -> str:
    """Return the reason why BIOS cannot boot an image, such as "has no boot sector"; empty if it can, or may."""
    block = read(0, 512)
    if len(block) < 512 or block[510:] != b"\x55\xaa":
        return "has no boot sector"
    partitions = list(_gpt(read, 512))
    if any(each.type == _BIOS_BOOT_TYPE or each.attributes & _LEGACY_BOOT for each in partitions):
        return ""
    has_code = any(block[:_BOOT_CODE])
    has_esp = any(each.type == _ESP_TYPE for each in partitions)
    if has_esp or (not has_code and _MBR_ESP in _mbr_types(block)):
        return "has a boot loader for UEFI only"
    return "" if has_code else "has no boot loader"


def _gpt(read: Reader, sector: int) -> Iterator[_Partition]:
    header = read(sector, _GPT_HEADER.size)
    if len(header) < _GPT_HEADER.size:
        return
    signature, first, count, size = _GPT_HEADER.unpack(header)
    if signature != b"EFI PART" or size < _GPT_ENTRY.size or count * size > _ENTRIES_MAX:
        return
    if first * sector > _OFFSET_MAX:
        return
    table = read(first * sector, count * size)
    for at in range(0, len(table) - _GPT_ENTRY.size + 1, size):
        kind, unique, attributes = _GPT_ENTRY.unpack_from(table, at)
        if any(kind):
            yield _Partition(_guid(kind), _guid(unique), attributes)


def _guid(raw: bytes) -> str:
    """Format a GUID, whose first three fields are little-endian."""
    first, second, third = struct.unpack_from("<IHH", raw)
    return f"{first:08x}-{second:04x}-{third:04x}-{raw[8:10].hex()}-{raw[10:].hex()}"


def _mbr(read: Reader) -> list[str] | None:
    """Return the kernel's PARTUUIDs of the Linux partitions of an MBR, or None if there is no MBR."""
    block = read(0, 512)
    if len(block) < 512 or block[510:] != b"\x55\xaa":
        return None
    types = _mbr_types(block)
    if not any(types) or _MBR_PROTECTIVE in types:
        return None
    disk = int.from_bytes(block[440:444], "little")
    return [f"{disk:08x}-{number + 1:02x}" for number, kind in enumerate(types) if kind == _MBR_LINUX]


def _mbr_types(block: bytes) -> list[int]:
    return [block[_MBR_ENTRIES + 16 * number + 4] for number in range(4)]
