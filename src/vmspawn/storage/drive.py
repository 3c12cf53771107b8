# SPDX-License-Identifier: LGPL-2.1-or-later
"""A drive: what the user wants attached, and the open file behind it."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from typing import NamedTuple

from ..errors import BadConfig, SystemFailure, UsageError

#: A bus is how the guest sees a drive. `null` on the wire means the first.
BUSES = ("virtio-blk", "nvme", "virtio-scsi", "scsi-cd")
DEFAULT_BUS = "virtio-blk"

#: Image formats that a node can be built for.
FORMATS = ("raw", "qcow2")
DEFAULT_FORMAT = "raw"

#: Linux cuts a virtio-blk serial to 20 bytes (VIRTIO_BLK_ID_BYTES), and NVMe has 20; one length for all buses keeps a
#: drive's serial the same on each.
SERIAL_MAX = 20
_SERIAL_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")

#: A drive's name is free text for people and for systemd's PROVIDER:VOLUME names; one line of reasonable length.
DRIVE_NAME_MAX = 255

# The qcow2 header (QEMU's docs/interop/qcow2.txt): magic, version, then the offset of the backing file's name.
_QCOW2_MAGIC = b"QFI\xfb"
_QCOW2_BACKING_OFFSET = slice(8, 16)

_O_PATH = getattr(os, "O_PATH", 0o10000000)


class Drive(NamedTuple):
    """A drive as the user asks for it.

    `path` is opened as the caller; an empty `name` is the path's file name. `format` None means raw, but refuses an
    image that looks like another format. `serial` empty derives one from the name.
    """

    path: str
    name: str = ""
    bus: str = DEFAULT_BUS
    format: str | None = None
    read_only: bool = False
    serial: str = ""


class Backing(NamedTuple):
    """An open file or block device that a drive stands on. Whoever holds a Backing owns `fd`."""

    fd: int
    block: bool
    writable: bool
    identity: tuple[int, ...]
    size: int

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self.fd)


def with_defaults(drive: Drive) -> Drive:
    """The drive with an absolute path, and named after its file if it has no name."""
    return drive._replace(path=os.path.abspath(drive.path), name=drive.name or os.path.basename(drive.path))


def check_name(name: str) -> str:
    """Return `name` if a drive may be called that, raise BadConfig if not."""
    if not name or len(name) > DRIVE_NAME_MAX or not name.isprintable():
        raise BadConfig(f"invalid drive name {name!r}", hint=f"use 1 to {DRIVE_NAME_MAX} printable characters")
    return name


def check_bus(bus: str) -> str:
    """Return `bus` if it exists, raise BadConfig if not."""
    if bus not in BUSES:
        raise BadConfig(f"unknown bus {bus!r}", hint=f"there are: {', '.join(BUSES)}")
    return bus


def check_format(image_format: str) -> str:
    """Return `image_format` if it exists, raise BadConfig if not."""
    if image_format not in FORMATS:
        raise BadConfig(f"unknown image format {image_format!r}", hint=f"there are: {', '.join(FORMATS)}")
    return image_format


def serial_for(name: str) -> str:
    """The serial number of a drive that was given none: its name if that fits, else a hash of it."""
    if 0 < len(name) <= SERIAL_MAX and _SERIAL_CHARACTERS.issuperset(name):
        return name
    import hashlib

    return hashlib.sha256(name.encode()).hexdigest()[:SERIAL_MAX]


def check_serial(serial: str) -> str:
    """Return `serial` if every bus can carry it, raise BadConfig if not."""
    if not 0 < len(serial) <= SERIAL_MAX or not _SERIAL_CHARACTERS.issuperset(serial):
        raise BadConfig(
            f"invalid serial {serial!r}", hint=f"use 1 to {SERIAL_MAX} of letters, digits, '.', '_' and '-'"
        )
    return serial


def open_drive(path: str, *, read_only: bool) -> Backing:
    """Open an image or block device as the caller.

    Raises SystemFailure with the reason of the operating system, BadConfig if it is not something to make a drive of.
    The caller owns the Backing.
    """
    # O_NONBLOCK so that opening a FIFO by mistake answers instead of waiting for a writer; QEMU clears it.
    flags = (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        fd = os.open(path, flags)
    except IsADirectoryError:
        raise BadConfig(f"{path} is a directory, not an image", hint=_DIRECTORY_HINT) from None
    except OSError as error:
        hint = "attach it read-only, or change its permissions" if _readable_only(path, error) else ""
        raise SystemFailure(f"cannot open {path}", error.errno or errno.EIO, hint=hint) from None
    try:
        return inspect(fd, what=path)
    except BaseException:
        os.close(fd)
        raise


_DIRECTORY_HINT = "name a disk image or a block device"


def _readable_only(path: str, error: OSError) -> bool:
    return error.errno in (errno.EACCES, errno.EROFS, errno.EPERM) and os.access(path, os.R_OK)


def inspect(fd: int, *, what: str = "the descriptor", read_only: bool | None = None) -> Backing:
    """Look at a descriptor that is to become a drive and say what it is.

    The drive is read-only if the descriptor is; `read_only` True makes a read-only drive of a writable descriptor (by
    a second, read-only descriptor: QEMU wants the access mode to match). Raises BadConfig for what QEMU could not
    use. On success the Backing owns `fd`; on failure the caller still does.
    """
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    if flags & _O_PATH:
        raise BadConfig(f"{what} is open with O_PATH only", hint="open it for reading, or reading and writing")
    access = flags & os.O_ACCMODE
    if access == os.O_WRONLY:
        raise BadConfig(f"{what} is open for writing only", hint="open it for reading and writing")
    found = os.fstat(fd)
    block = stat.S_ISBLK(found.st_mode)
    if not block and not stat.S_ISREG(found.st_mode):
        kind = _kind(found.st_mode)
        raise BadConfig(f"{what} is a {kind}, not an image or a block device", hint=_DIRECTORY_HINT)
    # QEMU opens /dev/fdset/N by comparing flags, and knows no O_SYNC (HOTPLUG.md 7).
    if flags & os.O_SYNC & ~os.O_DSYNC or flags & os.O_DSYNC:
        raise BadConfig(f"{what} is open with O_SYNC, which QEMU cannot use", hint="open it without O_SYNC")
    if read_only and access == os.O_RDWR:
        fd = _reopen_read_only(fd, what)
        access = os.O_RDONLY
    _clear_direct(fd)
    identity = (found.st_rdev,) if block else (found.st_dev, found.st_ino)
    size = os.lseek(fd, 0, os.SEEK_END) if block else found.st_size
    return Backing(fd, block, access == os.O_RDWR, identity, size)


def _kind(mode: int) -> str:
    kinds = {stat.S_IFDIR: "directory", stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket", stat.S_IFCHR: "character device"}
    return kinds.get(stat.S_IFMT(mode), "special file")


def _reopen_read_only(fd: int, what: str) -> int:
    """Replace the description behind a descriptor number by a read-only one of the same file."""
    try:
        fresh = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise SystemFailure(f"cannot open {what} read-only", error.errno or errno.EIO) from None
    os.dup2(fresh, fd, inheritable=False)
    os.close(fresh)
    return fd


def _clear_direct(fd: int) -> None:
    """QEMU 11.1 compares O_DIRECT with the node's cache mode, which is write-back."""
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    if flags & os.O_DIRECT:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags & ~os.O_DIRECT)


def choose_format(backing: Backing, image_format: str | None, *, what: str) -> str:
    """The format to use, after a look at the image's first bytes.

    A guest that owns a raw disk can write any header into it, so no format is ever guessed: not saying one means raw,
    and an image that looks like qcow2 is refused until the user says which. Raises BadConfig.
    """
    header = os.pread(backing.fd, 104, 0)
    is_qcow2 = header[:4] == _QCOW2_MAGIC
    if image_format is None:
        if is_qcow2:
            raise BadConfig(f"{what} looks like qcow2, and no format was given", hint="say format qcow2 (or raw)")
        return DEFAULT_FORMAT
    check_format(image_format)
    if image_format == "qcow2":
        _check_qcow2(header, is_qcow2, what)
    return image_format


def _check_qcow2(header: bytes, is_qcow2: bool, what: str) -> None:
    if not is_qcow2:
        raise BadConfig(f"{what} is not in qcow2 format", hint="say format raw, or convert it with qemu-img")
    if any(header[_QCOW2_BACKING_OFFSET]):
        # QEMU would open the backing file by the path in the header: a path of the image's author, not of the user.
        raise BadConfig(
            f"{what} has a backing file, which cannot be opened through a descriptor",
            hint="flatten it with: qemu-img convert -O qcow2 IMAGE FLAT",
        )


def parse_extra_drive(text: str) -> Drive:
    """Parse `--extra-drive=[FORMAT:][DISKTYPE:]PATH`. Raises UsageError.

    A prefix counts only if it is a known format or disk type, so that a path with a colon needs no quoting.
    """
    image_format, bus, rest = None, DEFAULT_BUS, text
    head, colon, tail = rest.partition(":")
    if colon and head in FORMATS:
        image_format, rest = head, tail
        head, colon, tail = rest.partition(":")
    if colon and head in BUSES:
        bus, rest = head, tail
    if not rest:
        raise UsageError(f"--extra-drive={text} names no path", hint="write --extra-drive=[FORMAT:][DISKTYPE:]PATH")
    return Drive(os.path.abspath(rest), os.path.basename(rest), bus, image_format)
