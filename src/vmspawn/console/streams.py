# SPDX-License-Identifier: LGPL-2.1-or-later
"""Reads and writes standard streams without blocking, and without setting O_NONBLOCK on them.

O_NONBLOCK belongs to the open file description, which the shell and its other children share. So a terminal or a pipe
is reopened through /proc/self/fd. Other files are written only when poll(2) reports them writable.
"""

from __future__ import annotations

import os
import select
import socket
import stat
from collections.abc import Callable

_FLAGS = os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC

#: Bytes that a writable pipe takes without blocking (pipe(7), PIPE_BUF).
_SAFE = select.PIPE_BUF

#: Bytes of one read(2). A terminal returns at most 4096.
READ_SIZE = 65536


class Output:
    """Writes to `fd`, a duplicate of the caller's descriptor. Owns the duplicate."""

    def __init__(self, fd: int) -> None:
        self.fd, own = _reopen(fd, os.O_WRONLY)
        self.write: Callable[[bytes], int] = self._write if own else self._careful_write
        if stat.S_ISSOCK(os.fstat(self.fd).st_mode):
            self.write = self._send

    def close(self) -> None:
        """Close the duplicate."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def _write(self, data: bytes) -> int:
        return os.write(self.fd, data)

    def _send(self, data: bytes) -> int:
        with socket.socket(fileno=os.dup(self.fd)) as connected:
            return connected.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)

    def _careful_write(self, data: bytes) -> int:
        poll = select.poll()
        poll.register(self.fd, select.POLLOUT)
        if not poll.poll(0):
            raise BlockingIOError
        return os.write(self.fd, data[:_SAFE])


class Input:
    """Reads from `fd`, a duplicate of the caller's descriptor. Owns the duplicate."""

    def __init__(self, fd: int) -> None:
        self.fd, _ = _reopen(fd, os.O_RDONLY)

    def close(self) -> None:
        """Close the duplicate."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def read(self) -> bytes:
        """Return the available bytes, or b"" at end of file.

        Raises BlockingIOError if no data is available yet, or another OSError.
        """
        poll = select.poll()
        poll.register(self.fd, select.POLLIN)
        if not poll.poll(0):
            raise BlockingIOError
        return os.read(self.fd, READ_SIZE)


def _reopen(fd: int, mode: int) -> tuple[int, bool]:
    """Return a duplicate, which the caller owns, and True if writing to it never blocks."""
    kind = os.fstat(fd).st_mode
    if stat.S_ISCHR(kind) or stat.S_ISFIFO(kind):
        try:
            return os.open(f"/proc/self/fd/{fd}", mode | _FLAGS), True
        except OSError:
            return os.dup(fd), False
    # A regular file never blocks, and opening it anew would lose its position.
    return os.dup(fd), stat.S_ISREG(kind)


def ensure_standard_streams() -> None:
    """Open /dev/null in place of each closed standard descriptor, so that no other file gets its number."""
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            # open(2) returns the lowest free number, which is this one: all lower ones are open.
            os.open(os.devnull, os.O_RDWR)
