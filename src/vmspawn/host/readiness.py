# SPDX-License-Identifier: LGPL-2.1-or-later
"""Telling the service manager that started us how we are doing: sd_notify(3), where there is somebody to tell."""

from __future__ import annotations

import contextlib
import os
import socket


def notify(*assignments: str) -> None:
    """Send assignments such as `READY=1`. Nobody to send them to, or nobody who takes them, is no error."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address[:1] not in ("/", "@"):
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.setblocking(False)
        with contextlib.suppress(OSError):
            sender.sendto("\n".join(assignments).encode(), address)
