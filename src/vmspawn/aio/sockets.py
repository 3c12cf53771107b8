# SPDX-License-Identifier: LGPL-2.1-or-later
"""Makes unix sockets for one user, identifies peers, and detects that a peer has hung up.

Each start imports this module, so it imports very little.
"""

from __future__ import annotations

import os
import select
import socket
import struct

#: A `struct ucred` (unix(7), SO_PEERCRED).
_UCRED = struct.Struct("3I")


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


def peer_process(connected: socket.socket) -> tuple[int, int]:
    """Return the process id and the user id of a unix socket's peer, as they were when it connected or listened.

    The process id is 0 if the process is in another PID namespace. Raises OSError for another kind of socket.
    """
    pid, uid, _gid = _UCRED.unpack(connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return pid, uid


def is_allowed(connected: socket.socket) -> bool:
    """Return whether the peer belongs to root or to this user. File modes may allow others, which are refused."""
    return peer_process(connected)[1] in (0, os.geteuid())


def has_hung_up(connected: socket.socket) -> bool:
    """Return whether the peer has closed both directions. A peer that only stopped sending may still read."""
    poll = select.poll()
    try:
        poll.register(connected, 0)
        return any(event & select.POLLHUP for _, event in poll.poll(0))
    except (OSError, ValueError):
        return True
