# SPDX-License-Identifier: LGPL-2.1-or-later
"""Defines the disk that a user requests, and checks its options."""

from __future__ import annotations

import os

from ..errors import BadConfig, UsageError
from ..record import Record
from ..text import printable, short_repr
from .formats import FORMATS, READ_ONLY_FORMATS
from .limits import NO_LIMITS, Limits

#: The buses that a disk can be attached to. In Varlink, null means the first.
BUSES = ("virtio-blk", "nvme", "nvme-ns", "virtio-scsi", "scsi-cd")
DEFAULT_BUS = "virtio-blk"
#: Chooses virtio-blk while ports are free, then virtio-scsi.
AUTO_BUS = "auto"

DISCARD_CHOICES = ("unmap", "ignore")
DETECT_ZEROES_CHOICES = ("off", "on", "unmap")
CACHE_CHOICES = ("writeback", "none")
AIO_CHOICES = ("threads", "io_uring")
#: The reactions to a request that fails on the host: report the error to the guest; stop the guest, and try again when
#: it is resumed; or stop the guest only if the host has no space left, and report other errors.
ON_ERROR_CHOICES = ("report", "stop", "enospc")

#: Linux cuts virtio-blk serial numbers to 20 bytes (VIRTIO_BLK_ID_BYTES), and NVMe has 20 bytes. One limit for all
#: buses keeps a disk's serial number the same on each.
SERIAL_MAX = 20
_SERIAL_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")

#: A disk's name is free text, because systemd names volumes PROVIDER:VOLUME. The limit keeps it on one line.
DISK_NAME_MAX = 255


class Disk(Record):
    """The disk that a user requests.

        Disk("data.qcow2", format="qcow2", bus="virtio-scsi", limits=Limits(iops=500))

    - `path` is opened with the caller's permissions. A scsi-cd without a path is an empty drive.
    - `name` is the path's file name by default.
    - `format` None means raw, but refuses an image that looks like another format.
    - `serial` is derived from the name by default.
    - `discard`, `detect_zeroes` and `aio` are options of QEMU's block nodes (qapi/block-core.json).
    - `cache` "none" bypasses the host's page cache.
    - `thread` gives the disk an I/O thread of its own.
    - `share` allows other machines to open the image for writing.
    - `boot_index` -1 gives the disk no place in the boot order; the disk with index 0 boots first.
    - `on_error` is the reaction to a request that fails on the host. The default is that of QEMU: report on the NVMe
      buses, which support only report, and enospc on the other buses.
    """

    path: str
    name: str = ""
    bus: str = DEFAULT_BUS
    format: str | None = None
    read_only: bool = False
    serial: str = ""
    discard: str = "unmap"
    detect_zeroes: str = "off"
    cache: str = "writeback"
    aio: str = "threads"
    thread: bool = False
    share: bool = False
    boot_index: int = -1
    on_error: str = ""
    limits: Limits = NO_LIMITS

    def __repr__(self) -> str:
        return short_repr(self)


def is_only_read(bus: str, image_format: str | None, *, read_only: bool) -> bool:
    """Return True if an image must be opened read-only: by the user's wish, for its bus, or for its format."""
    return read_only or bus == "scsi-cd" or image_format in READ_ONLY_FORMATS


def with_defaults(disk: Disk) -> Disk:
    """Return the disk with an absolute path, and with its file's name if it has no name."""
    path = os.path.abspath(disk.path) if disk.path else ""
    return disk._replace(path=path, name=disk.name or default_name(disk.path))


def default_name(path: str) -> str:
    """Return the default name of a disk: the file's name, with unprintable characters escaped."""
    return printable(os.path.basename(path))


def check_disk_name(name: str) -> str:
    """Return `name` if it is valid for a disk. Raises BadConfig if it is not."""
    if not name or len(name) > DISK_NAME_MAX or not name.isprintable():
        raise BadConfig(f"invalid disk name {name!r}", hint=f"use 1 to {DISK_NAME_MAX} printable characters")
    return name


def check_bus(bus: str) -> str:
    """Return `bus` if it exists. Raises BadConfig if it does not."""
    return check_choice("bus", bus, BUSES)


def check_choice(what: str, value: str, choices: tuple[str, ...]) -> str:
    """Return `value` if it is one of the choices. Raises BadConfig, which names the option `what`, if it is not."""
    if value not in choices:
        raise BadConfig(f"unknown {what} {value!r}", hint=f"choose one of: {', '.join(choices)}")
    return value


def check_disk_options(disk: Disk) -> None:
    """Raise BadConfig for an option that does not exist, or that the disk's bus does not support."""
    check_choice("discard mode", disk.discard, DISCARD_CHOICES)
    check_choice("zero detection", disk.detect_zeroes, DETECT_ZEROES_CHOICES)
    check_choice("cache mode", disk.cache, CACHE_CHOICES)
    check_choice("asynchronous I/O", disk.aio, AIO_CHOICES)
    if disk.detect_zeroes == "unmap" and disk.discard != "unmap":
        raise BadConfig("to unmap zeroes, discard must be unmap", hint="use detect-zeroes on, or discard unmap")
    if disk.thread and disk.bus not in ("virtio-blk", "virtio-scsi"):
        raise BadConfig(f"bus {disk.bus} cannot have an I/O thread", hint="use virtio-blk or virtio-scsi")
    if disk.on_error:
        check_choice("reaction to errors", disk.on_error, ON_ERROR_CHOICES)
        if disk.bus.startswith("nvme") and disk.on_error != "report":
            raise BadConfig(f"bus {disk.bus} always reports errors to the guest", hint=_ON_ERROR_HINT)
    if disk.boot_index < -1:
        raise BadConfig(f"a boot index of {disk.boot_index} is out of range", hint="0 boots first")


_ON_ERROR_HINT = "use virtio-blk or virtio-scsi, or report"


def serial_for(name: str) -> str:
    """Return the default serial number of a disk: its name if that fits, else a hash of the name."""
    if 0 < len(name) <= SERIAL_MAX and _SERIAL_CHARACTERS.issuperset(name):
        return name
    import hashlib

    return hashlib.sha256(name.encode()).hexdigest()[:SERIAL_MAX]


def check_serial(serial: str) -> str:
    """Return `serial` if every bus supports it. Raises BadConfig if not."""
    if not 0 < len(serial) <= SERIAL_MAX or not _SERIAL_CHARACTERS.issuperset(serial):
        raise BadConfig(f"invalid serial {serial!r}", hint=f"use 1 to {SERIAL_MAX} letters, digits, '.', '_' and '-'")
    return serial


def parse_extra_drive(text: str, *, default_bus: str = DEFAULT_BUS) -> Disk:
    """Parse `--extra-drive=[FORMAT:][DISKTYPE:]PATH`; the prefixes may come in either order. Raises UsageError.

    A prefix counts only if it is a known format or disk type, so that a path with a colon needs no quotes.
    """
    image_format, bus, rest = None, "", text
    while True:
        head, colon, tail = rest.partition(":")
        if colon and not image_format and head in FORMATS:
            image_format, rest = head, tail
        elif colon and not bus and head in BUSES:
            bus, rest = head, tail
        else:
            break
    if not rest:
        raise UsageError.with_fields(
            "{extra_disks={text}} names no path", hint="write {extra_disks=}[FORMAT:][DISKTYPE:]PATH", text=text
        )
    return Disk(os.path.abspath(rest), default_name(rest), bus or default_bus, image_format)
