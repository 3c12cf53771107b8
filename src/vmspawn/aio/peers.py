# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who is at the other end of a unix socket: whom we serve, whatever the modes of files and folders let through."""

from __future__ import annotations

import os
import socket
import struct

_CREDENTIALS = struct.Struct("iII")  # pid, uid, gid; unix(7), SO_PEERCRED


def is_allowed(connected: socket.socket) -> bool:
    """Whether the process that connected belonged to root or to our own user then."""
    return _credentials(connected)[1] in (0, os.geteuid())


def process_of(connected: socket.socket) -> int:
    """The process that connected, or that has listened where we connected; 0 if it is in a world of its own."""
    return _credentials(connected)[0]


def _credentials(connected: socket.socket) -> tuple[int, int, int]:
    pid, uid, gid = _CREDENTIALS.unpack(connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return pid, uid, gid
