# SPDX-License-Identifier: LGPL-2.1-or-later
"""Listening sockets that only their owner may connect to."""

from __future__ import annotations

import os
import socket


def listen(address: str, backlog: int) -> socket.socket:
    """Make a listening unix socket of mode 0600. The caller owns it, and the file at `address`. Raises OSError."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # By the mask, for between bind(2) and a chmod(2) anybody could connect.
        mask = os.umask(0o177)
        try:
            listener.bind(address)
        finally:
            os.umask(mask)
        listener.listen(backlog)
    except BaseException:
        listener.close()
        raise
    return listener
