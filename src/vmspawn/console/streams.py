# SPDX-License-Identifier: LGPL-2.1-or-later
"""Reads and writes our standard streams without blocking, and without O_NONBLOCK for others that share them.

O_NONBLOCK belongs to the open file description, which the shell and its other children use too. So a terminal or a pipe
is opened anew through /proc/self/fd; other files are written to only when poll(2) reports room.
"""

from __future__ import annotations

import os
import select
import socket
import stat
from collections.abc import Callable

_FLAGS = os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC

#: Bytes that a pipe which polls as writable takes without blocking (pipe(7), PIPE_BUF).
_SAFE = select.PIPE_BUF

#: Bytes taken in one read(2). A terminal has 4096 at the most.
READ_SIZE = 65536


class Output:
    """Writes to a duplicate, `fd`, of a descriptor, which stays the caller's."""

    def __init__(self, fd: int) -> None:
        self.fd, own = _reopen(fd, os.O_WRONLY)
        self.write: Callable[[bytes], int] = self._write if own else self._careful_write
        if stat.S_ISSOCK(os.fstat(self.fd).st_mode):
            self.write = self._send

    def close(self) -> None:
        """Close our descriptor."""
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
    """Reads from a duplicate, `fd`, of a descriptor, which stays the caller's."""

    def __init__(self, fd: int) -> None:
        self.fd, _ = _reopen(fd, os.O_RDONLY)

    def close(self) -> None:
        """Close our descriptor."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def read(self) -> bytes:
        """Return the bytes that are there, b"" at the end. Raises BlockingIOError if there are none yet, or OSError."""
        poll = select.poll()
        poll.register(self.fd, select.POLLIN)
        if not poll.poll(0):
            raise BlockingIOError
        return os.read(self.fd, READ_SIZE)


def _reopen(fd: int, mode: int) -> tuple[int, bool]:
    """Return a duplicate, which the caller owns, and whether writing to it never blocks."""
    kind = os.fstat(fd).st_mode
    if stat.S_ISCHR(kind) or stat.S_ISFIFO(kind):
        try:
            return os.open(f"/proc/self/fd/{fd}", mode | _FLAGS), True
        except OSError:
            return os.dup(fd), False
    # A regular file never blocks, and opening it anew would lose its position.
    return os.dup(fd), stat.S_ISREG(kind)


def ensure_standard_streams() -> None:
    """Open /dev/null wherever a standard descriptor is closed, before something else gets its number."""
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            # The lowest free number is this one, for those below are open.
            os.open(os.devnull, os.O_RDWR)
