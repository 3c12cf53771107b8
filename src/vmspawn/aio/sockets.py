# SPDX-License-Identifier: LGPL-2.1-or-later
"""Listening sockets that only their owner may connect to."""

from __future__ import annotations

import os
import socket


def listen(address: str, backlog: int) -> socket.socket:
    """Make a listening unix socket of mode 0600. The caller owns it, and the file at `address`. Raises OSError."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # The file gets the socket's mode. A chmod(2) after bind(2) would be late, a umask(2) is for all threads.
        os.fchmod(listener.fileno(), 0o600)
        listener.bind(address)
        listener.listen(backlog)
    except BaseException:
        listener.close()
        raise
    return listener
