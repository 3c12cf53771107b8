# SPDX-License-Identifier: LGPL-2.1-or-later
"""Reports a service's state to the service manager, with the protocol of sd_notify(3)."""

from __future__ import annotations

import contextlib
import os
import socket


class Notifier:
    """Sends messages to the socket in $NOTIFY_SOCKET. Does nothing if no service manager listens.

    The variables of the protocol are removed from the environment, so that child processes do not send messages.
    """

    def __init__(self) -> None:
        self._address = os.environ.pop("NOTIFY_SOCKET", "")
        if self._address.startswith("@"):
            self._address = "\0" + self._address[1:]
        #: The interval in seconds at which the service manager expects WATCHDOG=1, or 0 without a watchdog.
        self.watchdog = _watchdog()

    def send(self, **fields: object) -> None:
        """Send assignments in one message, such as READY=1 and STATUS= with a line for people."""
        if self._address[:1] not in ("/", "\0"):
            return
        message = "\n".join(f"{name}={value}" for name, value in fields.items()).encode()
        sender = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        with sender, contextlib.suppress(OSError):
            sender.sendto(message, self._address)


def _watchdog() -> float:
    """Return the interval of sd_watchdog_enabled(3) in seconds, or 0 if another process is watched."""
    microseconds, pid = (os.environ.pop(name, "") for name in ("WATCHDOG_USEC", "WATCHDOG_PID"))
    watched = pid in ("", str(os.getpid()))
    return int(microseconds) / 1e6 if watched and microseconds.isdecimal() else 0.0
