# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the guest printed while nobody read: QEMU's log of the console, which empties and fills without QEMU's help.

QEMU drops what it shows while there is no manager, but logs it first, and would go on for ever. So the log is a file in
memory that begins a little below the size that no file can have: QEMU appends until nothing more fits, and goes on
without. Whoever makes the file shorter empties it, unless it was full: a position at the very end does not come back,
and this QEMU logs nothing more. It has no name; QEMU holds it, and the next manager finds it there.
"""

from __future__ import annotations

import errno
import os

#: Bytes of output that are kept while the machine has no manager: the first ones. What follows is missing.
KEPT_MAX = 1 << 20

_NAME = "vmspawn-console"
_LARGEST = (1 << 63) - 1
_BEGIN = _LARGEST - KEPT_MAX


class ConsoleLog:
    """QEMU's log of the console. Owns the descriptor."""

    def __init__(self, fd: int, *, used_up: bool = False) -> None:
        self.fd = fd
        #: Whether it was full, so that something is missing.
        self.used_up = used_up

    @classmethod
    def make(cls) -> ConsoleLog | None:
        """An empty one, for QEMU to inherit and to open for appending. None where files are limited in their size
        (RLIMIT_FSIZE). Raises OSError."""
        log = cls(os.memfd_create(_NAME))
        try:
            log.empty()
        except OSError as error:
            log.close()
            if error.errno != errno.EFBIG:
                raise
            return None
        return log

    @classmethod
    def of(cls, pid: int) -> ConsoleLog | None:
        """The one that a QEMU holds which another manager started; None if there is none."""
        folder = f"/proc/{pid}/fd"
        try:
            descriptors = [each for each in os.listdir(folder) if _is_log(f"{folder}/{each}")]
            if not descriptors:
                return None
            used_up = any(_position(pid, number) == _LARGEST for number in descriptors)
            return cls(os.open(f"{folder}/{descriptors[0]}", os.O_RDWR | os.O_CLOEXEC), used_up=used_up)
        except OSError:
            return None  # it ends just now

    @property
    def size(self) -> int:
        """How many bytes are in it."""
        return max(0, os.fstat(self.fd).st_size - _BEGIN)

    def read(self, size: int) -> bytes:
        """The first bytes of it."""
        return os.pread(self.fd, size, _BEGIN)

    def empty(self) -> None:
        """Forget what is in it."""
        os.ftruncate(self.fd, _BEGIN)

    def close(self) -> None:
        """Let go of it. May be called again."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def _is_log(path: str) -> bool:
    try:
        return os.readlink(path).startswith(f"/memfd:{_NAME} ")
    except OSError:
        return False  # closed meanwhile


def _position(pid: int, number: str) -> int:
    """Where in its file a descriptor of a process stands (proc(5), fdinfo)."""
    with open(f"/proc/{pid}/fdinfo/{number}") as file:
        return int(file.readline().split()[1])
