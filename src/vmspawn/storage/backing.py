# SPDX-License-Identifier: LGPL-2.1-or-later
"""Opens and inspects the file or block device behind a disk.

QEMU opens none of the user's paths; vmspawn opens them as the user, and passes the descriptors to QEMU.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat

from ..errors import BadConfig, SnapshotInUse, SystemFailure
from ..images import snapshot_files
from ..record import Record

_O_PATH = getattr(os, "O_PATH", 0o10000000)

#: The unit of QEMU's disk sizes and of sizes in sysfs, whatever the device's sector size.
SECTOR = 512

_DIRECTORY_HINT = "name a disk image or a block device"


class Backing(Record):
    """An open file or block device behind a disk. The holder of a Backing owns and closes `fd`; -1 means closed.

    `identity` is (st_dev, st_ino) of a file and (st_rdev,) of a block device. `size` is in bytes.
    """

    fd: int
    is_block_device: bool
    is_writable: bool
    identity: tuple[int, ...]
    size: int

    def copy(self) -> Backing:
        """Duplicate the descriptor; the caller owns the copy. Raises SystemFailure."""
        try:
            return self._replace(fd=fcntl.fcntl(self.fd, fcntl.F_DUPFD_CLOEXEC, 0))
        except OSError as error:
            raise SystemFailure("cannot duplicate the descriptor of the image", error.errno or errno.EMFILE) from None

    def close(self) -> None:
        """Close the descriptor, if it is open."""
        if self.fd >= 0:
            os.close(self.fd)


def open_disk(path: str, *, read_only: bool) -> Backing:
    """Open an image or block device with the caller's permissions. The caller owns the Backing.

    Raises SystemFailure with the operating system's error, or BadConfig for a file that cannot be a disk.
    """
    # With O_NONBLOCK, opening a FIFO by mistake returns instead of waiting for a writer. QEMU clears the flag.
    flags = (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        fd = os.open(path, flags)
    except IsADirectoryError:
        raise BadConfig(f"{path} is a directory, not an image", hint=_DIRECTORY_HINT) from None
    except OSError as error:
        hint = _READ_ONLY_HINTS[error.errno == errno.EROFS] if _readable_only(path, error) else ""
        raise SystemFailure(f"cannot open {path}", error.errno or errno.EIO, hint=hint) from None
    return take_descriptor(fd, what=path)


#: The ioctl that returns whether a block device is read-only, as an int (linux/fs.h).
_BLKROGET = 0x125E

#: Hints for a file that can be read but not written: by its permissions, or by its file system or device.
_READ_ONLY_HINTS = ("attach it read-only, or change its permissions", "attach it read-only, or attach a copy")


def _readable_only(path: str, error: OSError) -> bool:
    return error.errno in (errno.EACCES, errno.EROFS, errno.EPERM) and os.access(path, os.R_OK)


def take_descriptor(fd: int, *, what: str = "the descriptor", read_only: bool | None = None) -> Backing:
    """Return the Backing of a descriptor as `inspect_descriptor` does. On failure the descriptor is closed."""
    try:
        return inspect_descriptor(fd, what=what, read_only=read_only)
    except BaseException:
        os.close(fd)
        raise


def inspect_descriptor(fd: int, *, what: str = "the descriptor", read_only: bool | None = None) -> Backing:
    """Return the Backing that describes a descriptor.

    The disk is read-only if the descriptor is. With `read_only` True, a writable descriptor is replaced by a read-only
    one of the same file, because QEMU requires that the access mode matches. Raises BadConfig for a descriptor that
    QEMU cannot use. On success the Backing owns `fd`; on failure the caller still owns it.
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
    if access == os.O_RDWR and not read_only and (owner := snapshot_files.owner_of(found.st_dev, found.st_ino)):
        raise SnapshotInUse(
            f"{what} is part of snapshot {owner} and must not change",
            hint=f"open it read-only, or start a copy with: vmspawn --fork={owner}",
        )
    # QEMU opens /dev/fdset/N by comparing flags, and does not support O_SYNC (docs/qemu.md, "Descriptor sets").
    if flags & os.O_SYNC & ~os.O_DSYNC or flags & os.O_DSYNC:
        raise BadConfig(f"{what} is open with O_SYNC, which QEMU cannot use", hint="open it without O_SYNC")
    if read_only and access == os.O_RDWR:
        fd = _reopen_read_only(fd, what)
        access = os.O_RDONLY
    if block and access == os.O_RDWR and _is_read_only_device(fd):
        raise SystemFailure(f"cannot write to {what}", errno.EROFS, hint=_READ_ONLY_HINTS[True])
    identity = (found.st_rdev,) if block else (found.st_dev, found.st_ino)
    size = os.lseek(fd, 0, os.SEEK_END) if block else found.st_size
    backing = Backing(fd, block, access == os.O_RDWR, identity, size)
    # The user's cache mode decides whether the disk bypasses the page cache; reading the header must not bypass it.
    set_direct(backing, False, what=what)
    return backing


def _is_read_only_device(fd: int) -> bool:
    """Return whether a block device is read-only. Root can open it for writing nevertheless."""
    with contextlib.suppress(OSError):
        return bool.from_bytes(fcntl.ioctl(fd, _BLKROGET, bytes(4)))
    return False


def _kind(mode: int) -> str:
    kinds = {stat.S_IFDIR: "directory", stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket", stat.S_IFCHR: "character device"}
    return kinds.get(stat.S_IFMT(mode), "special file")


def _reopen_read_only(fd: int, what: str) -> int:
    """Replace the open file description of a descriptor by a read-only one of the same file."""
    try:
        fresh = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise SystemFailure(f"cannot open {what} read-only", error.errno or errno.EIO) from None
    os.dup2(fresh, fd, inheritable=False)
    os.close(fresh)
    return fd


def whole_sectors(size: int) -> int:
    """Return the size of QEMU's disk for a raw file of `size` bytes: QEMU rounds up to whole sectors."""
    return -(-size // SECTOR) * SECTOR


def size_now(path: str, identity: tuple[int, ...], *, is_block_device: bool) -> int | None:
    """Return the present size in bytes of an image whose descriptor only QEMU has, or None if it cannot be found.

    `identity` is that of the Backing. If the path now names another file, the original file's size is returned.
    """
    if is_block_device:
        return _size_of_device(identity[0])
    try:
        found = os.stat(path) if path else None
    except OSError:
        found = None
    if found is not None and (found.st_dev, found.st_ino) == identity:
        return found.st_size
    return _size_of_open_file(identity)


def _size_of_device(number: int) -> int | None:
    try:
        with open(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}/size") as file:
            return int(file.read()) * SECTOR
    except (OSError, ValueError):
        return None


def _size_of_open_file(identity: tuple[int, ...]) -> int | None:
    """Return the size of a file that any process has open, or None."""
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            for fd in os.listdir(f"/proc/{pid}/fd"):
                found = os.stat(f"/proc/{pid}/fd/{fd}")
                if (found.st_dev, found.st_ino) == identity:
                    return found.st_size
        except OSError:
            continue
    return None


def set_direct(backing: Backing, direct: bool, *, what: str) -> None:
    """Set or clear O_DIRECT, with which a descriptor bypasses the host's page cache.

    QEMU 11.1 compares the flag with the node's cache mode. Raises BadConfig if the file system does not support
    O_DIRECT.
    """
    flags = fcntl.fcntl(backing.fd, fcntl.F_GETFL)
    wanted = flags | os.O_DIRECT if direct else flags & ~os.O_DIRECT
    if wanted == flags:
        return
    try:
        fcntl.fcntl(backing.fd, fcntl.F_SETFL, wanted)
    except OSError:
        raise BadConfig(
            f"cache none needs O_DIRECT, which the file system of {what} does not have", hint="use cache writeback"
        ) from None
