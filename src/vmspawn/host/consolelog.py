# SPDX-License-Identifier: LGPL-2.1-or-later
"""Keeps the guest's output while there is no manager, in QEMU's log of the console.

QEMU drops the output while there is no manager, but appends it to the log first. QEMU does not limit the log's size.
So the log is a memfd that begins, by its size, just below QEMU's limit on file sizes (RLIMIT_FSIZE): QEMU appends until
the limit is reached, and continues without the log. Truncating the file to its first size empties the log, and QEMU
appends again. The file has no name; the next manager finds it among QEMU's open files.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import signal
from _thread import allocate_lock
from collections.abc import Iterator

#: Bytes of output that are kept while the machine has no manager. Later output is lost.
KEPT_MAX = 1 << 20

_NAME = "vmspawn-console-log"

# The limit on file sizes, larger than any image. It is 1 MiB below the largest offset, because at that offset the
# kernel refuses every write before it applies the limit: position plus count would overflow.
_END = (1 << 63) - (1 << 20)
_BEGIN = _END - KEPT_MAX

# The limit applies to the whole process, and several threads may start machines.
_LIMITING = allocate_lock()


class ConsoleLog:
    """QEMU's log of the console. Owns the descriptor."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    @classmethod
    def make(cls) -> ConsoleLog | None:
        """Make an empty log, for QEMU to inherit and to open for appending; QEMU is to be started inside `bounded`.

        Returns None if the size of files is limited already (RLIMIT_FSIZE). Python ignores SIGXFSZ, and so does QEMU as
        its child; if this process has another action for the signal, returns None, because a full log would kill QEMU.
        Raises OSError.
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
        """Open the log of a QEMU that another manager started; returns None if it has none."""
        folder = f"/proc/{pid}/fd"
        try:
            descriptors = [each for each in os.listdir(folder) if _is_log(f"{folder}/{each}")]
            return cls(os.open(f"{folder}/{descriptors[0]}", os.O_RDWR | os.O_CLOEXEC)) if descriptors else None
        except OSError:
            return None  # QEMU has just ended

    @property
    def size(self) -> int:
        """The number of bytes in the log."""
        return max(0, os.fstat(self.fd).st_size - _BEGIN)

    @property
    def is_full(self) -> bool:
        """True if the log is full, so that output may be missing."""
        return self.size >= KEPT_MAX

    def read(self, size: int) -> bytes:
        """Return the first bytes of the log."""
        return os.pread(self.fd, size, _BEGIN)

    def empty(self) -> None:
        """Discard the bytes in the log."""
        os.ftruncate(self.fd, _BEGIN)

    def close(self) -> None:
        """Close the descriptor. May be called again."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Limit the size of files to the log's end, for processes that are started inside. No other file is as large."""
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
        return False  # the descriptor was closed meanwhile
