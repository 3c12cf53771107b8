# SPDX-License-Identifier: LGPL-2.1-or-later
"""Telling a service manager how things stand: the protocol of sd_notify(3), without its library."""

from __future__ import annotations

import contextlib
import os
import socket


class Notifier:
    """Sends to the socket that $NOTIFY_SOCKET names, and does nothing where there is none or it does not listen.

    The variables are taken out of the environment: what we start must not speak for us.
    """

    def __init__(self) -> None:
        self._address = os.environ.pop("NOTIFY_SOCKET", "")
        if self._address.startswith("@"):
            self._address = "\0" + self._address[1:]
        #: Seconds within which the service manager wants to hear WATCHDOG=1 again, or 0 if it does not ask for that.
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
    """The interval of sd_watchdog_enabled(3), in seconds, if it is us who are watched."""
    microseconds, pid = (os.environ.pop(name, "") for name in ("WATCHDOG_USEC", "WATCHDOG_PID"))
    watched = pid in ("", str(os.getpid()))
    return int(microseconds) / 1e6 if watched and microseconds.isdecimal() else 0.0
