# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the guest printed while nobody read: QEMU's log of the console, which empties and fills without QEMU's help.

QEMU drops what it shows while there is no manager, but logs it first, and would go on for ever. So the log is a file in
memory that begins a little below a limit on the size of files with which QEMU is started: QEMU appends until nothing
more fits, and goes on without. Whoever makes the file shorter empties it, and QEMU appends again. It has no name; QEMU
holds it, and the next manager finds it there.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import signal
from _thread import allocate_lock
from collections.abc import Iterator

#: Bytes of output that are kept while the machine has no manager: the first ones. What follows is missing.
KEPT_MAX = 1 << 20

_NAME = "vmspawn-console-log"

# No image is as large. Not the largest size that there is: with its position there no file is written to ever again,
# for the kernel looks whether position and count make a valid sum before it looks where the file ends.
_END = (1 << 63) - (1 << 20)
_BEGIN = _END - KEPT_MAX

# The limit is that of the whole process, and machines may be started in several threads.
_LIMITING = allocate_lock()


class ConsoleLog:
    """QEMU's log of the console. Owns the descriptor."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    @classmethod
    def make(cls) -> ConsoleLog | None:
        """An empty one, for QEMU to inherit and to open for appending, with `bounded` around its start. Raises OSError.

        None where files are limited in their size already (RLIMIT_FSIZE), or where QEMU would not ignore the signal
        that comes with each byte too many, as every child of Python does.
        """
        if signal.getsignal(signal.SIGXFSZ) is not signal.SIG_IGN:
            return None
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
            return cls(os.open(f"{folder}/{descriptors[0]}", os.O_RDWR | os.O_CLOEXEC)) if descriptors else None
        except OSError:
            return None  # it ends just now

    @property
    def size(self) -> int:
        """How many bytes are in it."""
        return max(0, os.fstat(self.fd).st_size - _BEGIN)

    @property
    def is_full(self) -> bool:
        """Whether nothing more fits, so that something may be missing."""
        return self.size >= KEPT_MAX

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


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """What is started meanwhile writes no file beyond the log's end, which no other file comes near."""
    with _LIMITING:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        if soft != resource.RLIM_INFINITY and soft <= _END:
            yield
            return
        resource.setrlimit(resource.RLIMIT_FSIZE, (_END, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def _is_log(path: str) -> bool:
    try:
        return os.readlink(path).startswith(f"/memfd:{_NAME} ")
    except OSError:
        return False  # closed meanwhile
