# SPDX-License-Identifier: LGPL-2.1-or-later
"""Makes, opens and removes the directories of snapshots.

A snapshot is made under a temporary name, and renamed when it is complete. Each process that uses a snapshot holds a
shared flock(2) on the manifest. The QEMU of each copy inherits the descriptor, so the lock ends with QEMU, not with a
manager.

This module is on the start path and imports next to nothing.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat

from ..errors import NoSuchSnapshot, SnapshotExists, SnapshotInUse, StartError, SystemFailure, UsageError, VmspawnError
from ..host import runtime
from ..images import snapshot_files
from ..images.snapshot_files import MANIFEST, UNFINISHED, root
from . import manifest as manifests
from .durable_files import write_file
from .manifest import Manifest

#: The file of a warm snapshot that contains the console's output until the snapshot was made.
CONSOLE = "console"

#: The name of the snapshot that lists a machine's newest disks (see newest.py).
CURRENT = "current"


def parse_name(text: str) -> tuple[str, str]:
    """Split `MACHINE@NAME`; without `@`, the name is empty. Raises UsageError."""
    machine, at, name = text.partition("@")
    runtime.check_name(machine)
    if at:
        check_name(name)
    return machine, name


def check_name(name: str) -> str:
    """Return `name` if it is a valid name for a snapshot. Raises UsageError."""
    try:
        return runtime.check_name(name)
    except UsageError:
        raise UsageError(
            f"invalid snapshot name {name!r}",
            hint="use letters, digits, dots, dashes and underscores; begin with a letter or digit",
        ) from None


def path_of(full_name: str, parent: str = "") -> str:
    """Return the directory of a snapshot. `parent` is the directory of all snapshots by default."""
    return os.path.join(parent or root(), full_name)


class NewFolder:
    """The directory of a snapshot that is being made."""

    def __init__(self, full_name: str, parent: str = "") -> None:
        """Prepare the directory. `parent` is the directory of all snapshots by default."""
        self.full_name = full_name
        self._parent = parent or root()
        self.path = os.path.join(self._parent, f"{UNFINISHED}{full_name}-{os.getpid()}")

    def make(self) -> None:
        """Make the directory; `finish` or `discard` must follow. Raises SnapshotExists, StartError, SystemFailure."""
        full_name = self.full_name
        try:
            os.makedirs(self._parent, mode=0o700, exist_ok=True)
            check_ours(self._parent)
            _clean_up(self._parent)
            if os.path.lexists(path_of(full_name, self._parent)):
                raise _exists(full_name)
            os.mkdir(self.path, 0o700)
        except OSError as error:
            raise SystemFailure(f"cannot make the directory {self.path}", error.errno or errno.EIO) from None

    def create(self, name: str) -> int:
        """Create a file for reading and writing; the caller owns the descriptor. Raises OSError."""
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        return os.open(os.path.join(self.path, name), flags, 0o600)

    def final(self, name: str) -> str:
        """Return the path of a file in the finished snapshot."""
        return os.path.join(path_of(self.full_name, self._parent), name)

    def write(self, name: str, content: bytes) -> None:
        """Write a file. Raises OSError."""
        write_file(os.path.join(self.path, name), content)

    def finish(self) -> None:
        """Give the directory its name. Raises SnapshotExists, OSError."""
        try:
            os.rename(self.path, path_of(self.full_name, self._parent))
        except OSError as error:
            if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
                raise _exists(self.full_name) from None
            raise
        self.path = path_of(self.full_name, self._parent)
        sync(self._parent)

    def discard(self) -> None:
        """Remove the directory, finished or not."""
        _remove(self.path)


def _clean_up(parent: str) -> None:
    """Remove the directories that processes left behind when they died while making or removing a snapshot."""
    for name in os.listdir(parent):
        pid = name.rpartition("-")[2]
        if name.startswith(UNFINISHED) and pid.isdigit() and not runtime.start_time(int(pid)):
            _remove(os.path.join(parent, name))


def _exists(full_name: str) -> SnapshotExists:
    return SnapshotExists(
        f"snapshot {full_name} exists already",
        hint=f"choose another name, or remove it with: vmctl remove-snapshot {full_name}",
    )


def sync(path: str) -> None:
    """Wait until a file or a directory is on the disk. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def check_ours(path: str) -> None:
    """Raise StartError for a directory that another user could have written to.

    Otherwise QEMU would load that user's data with the permissions of this user.
    """
    found = os.lstat(path)
    if not stat.S_ISDIR(found.st_mode):
        raise StartError(f"{path} is not a directory")
    if found.st_uid not in (0, os.geteuid()):
        raise StartError(f"{path} belongs to another user", hint="vmspawn loads only your own and root's snapshots")
    if stat.S_IMODE(found.st_mode) & 0o022:
        raise StartError(f"other users may write to {path}", hint=f"chmod go-w {path}")


class OpenSnapshot:
    """An open snapshot, which no process can remove until it is closed. Owns the manifest's descriptor."""

    manifest: Manifest

    def __init__(self, full_name: str, parent: str = "", *, wait: bool = True) -> None:
        """Open a snapshot in the directory `parent`, by default the directory of all snapshots.

        Waits while another process has locked the snapshot exclusively; if `wait` is False, raises SnapshotInUse
        instead. Raises NoSuchSnapshot, StartError.
        """
        self.path = path_of(full_name, parent)
        self.fd = -1
        self._full_name = full_name
        self._shared = fcntl.LOCK_SH if wait else fcntl.LOCK_SH | fcntl.LOCK_NB
        self._open()

    def _open(self) -> None:
        """Open, lock and read the manifest.

        Starts again if another process has replaced or removed the manifest before it was locked.
        """
        while True:
            self._open_file()
            try:
                fcntl.flock(self.fd, self._shared)
                if self._is_in_place():
                    self.manifest = manifests.load(_read(self.fd), self._full_name)
                    return
            except BlockingIOError:
                self.close()
                raise SnapshotInUse(
                    f"another process is removing {self._full_name}, or writing its overlays to the images",
                    hint="try again later; see: vmctl list-snapshots",
                ) from None
            except BaseException:
                self.close()
                raise
            self.close()

    def _open_file(self) -> None:
        try:
            check_ours(os.path.dirname(self.path))
            check_ours(self.path)
            self.fd = os.open(self._file, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            raise NoSuchSnapshot(f"there is no snapshot {self._full_name}", hint="see: vmctl list-snapshots") from None
        except OSError as error:
            raise StartError(f"cannot open snapshot {self._full_name}: {error.strerror}") from None

    @property
    def _file(self) -> str:
        return os.path.join(self.path, MANIFEST)

    def _is_in_place(self) -> bool:
        """Return whether the path of the manifest still leads to the open file."""
        try:
            return os.path.samestat(os.lstat(self._file), os.fstat(self.fd))
        except FileNotFoundError:
            return False

    def lock_alone(self) -> bool:
        """Lock the snapshot exclusively. Returns False if a machine or another process uses it.

        Raises NoSuchSnapshot if another process has removed it meanwhile, StartError.
        """
        try:
            while True:
                # Converting this process's shared lock to an exclusive one fails while another process has a shared
                # lock. The conversion is not atomic: another process can take the lock in between, and remove or
                # replace the manifest.
                fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if self._is_in_place():
                    return True
                self.close()
                self._open()
        except BlockingIOError:
            return False

    def replace(self, manifest: Manifest) -> None:
        """Replace the manifest of an exclusively locked snapshot; the new file is locked too. Raises OSError."""
        fd = os.open(self._file + ".new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with open(fd, "wb", closefd=False) as file:
                file.write(manifest.to_json())
            os.fsync(fd)
            os.rename(self._file + ".new", self._file)
        except BaseException:
            os.close(fd)
            with contextlib.suppress(OSError):
                os.unlink(self._file + ".new")
            raise
        self.close()
        self.fd, self.manifest = fd, manifest

    def remove(self) -> None:
        """Remove the snapshot. Raises NoSuchSnapshot, SnapshotInUse, StartError."""
        _check_unused(self._full_name, self)
        # The directory is renamed first, so that other processes never see a snapshot that lacks files.
        hidden = os.path.join(os.path.dirname(self.path), f"{UNFINISHED}{self._full_name}-removed-{os.getpid()}")
        os.rename(self.path, hidden)
        _remove(hidden)

    def close(self) -> None:
        """Close the snapshot, which releases the lock. May be called again."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def _read(fd: int) -> bytes:
    return os.pread(fd, os.fstat(fd).st_size, 0)


def find(machine: str, name: str) -> str:
    """Return the full name of a snapshot. With an empty `name`, returns the machine's only snapshot.

    MACHINE@current counts only if the machine has no other snapshot. Raises NoSuchSnapshot, UsageError.
    """
    if name:
        return f"{machine}@{name}"
    current = f"{machine}@{CURRENT}"
    every = [each for each in snapshot_files.names() if each.startswith(f"{machine}@")]
    found = [each for each in every if each != current] or every
    if not found:
        raise NoSuchSnapshot(f"machine {machine} has no snapshot", hint=f"make one with: vmctl snapshot {machine}")
    if len(found) > 1:
        raise UsageError(f"machine {machine} has {len(found)} snapshots", hint=f"name one of: {', '.join(found)}")
    return found[0]


def remove(full_name: str) -> None:
    """Remove a snapshot. Raises NoSuchSnapshot, SnapshotInUse, StartError."""
    with contextlib.closing(OpenSnapshot(full_name)) as snapshot:
        snapshot.remove()


def check_discards_nothing(full_name: str) -> None:
    """Refuse to remove the newest state of a machine's disks while the machine has snapshots. Raises SnapshotInUse.

    After the last of them is removed, the newest state is written to the disks.
    """
    machine, _, name = full_name.partition("@")
    others = [each for each in snapshot_files.names() if each.startswith(f"{machine}@") and each != full_name]
    if name == CURRENT and others:
        raise SnapshotInUse(
            f"{full_name} has everything that {machine} wrote to its disks after it was saved",
            hint=f"to keep this data, remove {', '.join(others)} instead: the data is then written to the disks",
        )


def _check_unused(full_name: str, snapshot: OpenSnapshot) -> None:
    for other, found in snapshot_files.readings():
        if other == full_name:
            continue
        if found is None:
            raise SnapshotInUse(
                f"{other} may be based on {full_name}, and its manifest cannot be read",
                hint=f"if {other} is not needed: rm -r {path_of(other)}",
            )
        if any(os.path.dirname(each["path"]) == snapshot.path for each in found["files"]):
            raise SnapshotInUse(
                f"{other} is based on {full_name}", hint=f"remove it first: vmctl remove-snapshot {other}"
            )
    if not snapshot.lock_alone():
        raise SnapshotInUse(f"a machine uses {full_name}", hint="end it first; see: vmctl list")
    for name in os.listdir(snapshot.path):
        if is_locked(os.path.join(snapshot.path, name)):
            raise SnapshotInUse(f"a machine uses {name} of {full_name}", hint="end it first; see: vmctl list")


def remove_temporary() -> list[str]:
    """Remove the snapshots that were made for copies and have no copy left. Returns the names of their machines."""
    removed = []
    for name, found in snapshot_files.manifests():
        if found.get("is_temporary") and name.partition("@")[2] != CURRENT:
            with contextlib.suppress(VmspawnError, OSError):
                remove(name)
                removed.append(str(found["machine"]))
    return removed


#: The start and the length of the range in which QEMU locks bytes of an image (its block/file-posix.c).
_QEMU_LOCKS = (100, 200)


def is_locked(path: str) -> bool:
    """Return whether a QEMU has locked an image, and so has it open."""
    import struct

    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        start, length = _QEMU_LOCKS
        # A `struct flock` (fcntl(2)): type, whence, start, length, process.
        asked = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, start, length, 0)
        answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, asked)
        return bool(struct.unpack("hhqqi4x", answer)[0] != fcntl.F_UNLCK)
    finally:
        os.close(fd)


def _remove(path: str) -> None:
    """Remove a directory as far as possible."""
    # Imported here, because a manager that removes no directory need not load this large module.
    import shutil

    shutil.rmtree(path, ignore_errors=True)
