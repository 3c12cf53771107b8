# SPDX-License-Identifier: LGPL-2.1-or-later
"""Makes unix sockets for one user, identifies peers, and detects that a peer has hung up.

Each start imports this module, so it imports very little.
"""

from __future__ import annotations

import errno
import math
import os
import select
import socket
import struct

#: A `struct ucred` (unix(7), SO_PEERCRED).
_UCRED = struct.Struct("3I")

#: A `struct timeval` (socket(7), SO_SNDTIMEO).
_TIMEVAL = struct.Struct("ll")


def listen(address: str, backlog: int) -> socket.socket:
    """Make a listening unix socket of mode 0600. The caller owns it, and the file at `address`. Raises OSError."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # The file gets the socket's mode. chmod(2) after bind(2) would be too late, and umask(2) affects all threads.
        os.fchmod(listener.fileno(), 0o600)
        listener.bind(address)
        listener.listen(backlog)
    except BaseException:
        listener.close()
        raise
    return listener


def connect(address: str, *, timeout: float) -> socket.socket:
    """Connect to a unix socket; returns a blocking socket, which the caller owns.

    Waits up to `timeout` seconds while the listener's queue is full. Raises TimeoutError, OSError.
    """
    connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # With Python's own timeout, the socket does not block, and connect(2) fails at once if the queue is full.
        _set_send_timeout(connected, timeout)
        connected.connect(address)
        _set_send_timeout(connected, 0)
    except BlockingIOError:
        connected.close()
        raise TimeoutError(errno.ETIMEDOUT, f"accepted no connection within {timeout:g} s") from None
    except BaseException:
        connected.close()
        raise
    return connected


def _set_send_timeout(connected: socket.socket, seconds: float) -> None:
    microseconds = round(seconds * 1_000_000)
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _TIMEVAL.pack(*divmod(microseconds, 1_000_000)))


def peer_process(connected: socket.socket) -> tuple[int, int]:
    """Return the process id and the user id of a unix socket's peer, as they were when it connected or listened.

    The process id is 0 if the process is in another PID namespace. A socket of another kind has the process id 0, and
    the user id 2**32 - 1, which no user has.
    """
    pid, uid, _gid = _UCRED.unpack(connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return pid, uid


def is_allowed(connected: socket.socket) -> bool:
    """Return whether the peer's user is root or this process's user. Callers disconnect all other peers."""
    return peer_process(connected)[1] in (0, os.geteuid())


def is_readable(fd: int, *, within: float) -> bool:
    """Wait up to `within` seconds until reading from a descriptor would not block; returns whether it would not.

    select(2) fails for descriptors of 1024 and more, which programs that use the library may have.
    """
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(math.ceil(1000 * max(0.0, within))))


def has_hung_up(connected: socket.socket) -> bool:
    """Return whether the peer has closed both directions. A peer that only stopped sending may still read."""
    poll = select.poll()
    try:
        poll.register(connected, 0)
        return any(event & select.POLLHUP for _, event in poll.poll(0))
    except (OSError, ValueError):
        return True
