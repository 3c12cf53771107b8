# SPDX-License-Identifier: LGPL-2.1-or-later
"""Passes the size of the console's window to the guest.

QEMU's command `chardev-window-size-changed` is used for a virtio console until it fails; no release up to 11.1 has it.
The built-in guest also gets the size through its own port.
"""

from __future__ import annotations

import contextlib
import socket

from ..boot.console import CHARDEV, SIZE_PORT_ID
from ..errors import NotConnected, QmpError, Timeout
from ..qmp.events import Event
from ..qmp.monitor import Monitor


class Window:
    """The window of one machine's console. Owns the socket to the guest's port, if there is one."""

    def __init__(self, monitor: Monitor, port: socket.socket | None, *, ask_qemu: bool) -> None:
        self._monitor = monitor
        self._port = port
        self._ask_qemu = ask_qemu
        self._size = (0, 0)
        monitor.listen(self._event)

    async def resize(self, rows: int, columns: int) -> None:
        """Pass the size to the guest, if possible. A size of 0 is unknown and is not passed."""
        if not (rows and columns):
            return
        self._size = rows, columns
        self._tell_port()
        if self._ask_qemu:
            await self._resize_device(rows, columns)

    def _tell_port(self) -> None:
        # If the guest does not read, its port is full, and this size is dropped.
        if self._port is not None and any(self._size):
            with contextlib.suppress(OSError):
                self._port.send("{} {}\n".format(*self._size).encode())

    def _event(self, event: Event) -> None:
        """Send the size again after a rebooted guest has opened its port."""
        if event.name == "VSERPORT_CHANGE" and event.data == {"id": SIZE_PORT_ID, "open": True}:
            self._tell_port()

    async def _resize_device(self, rows: int, columns: int) -> None:
        size: dict[str, object] = {"id": CHARDEV, "cols": columns, "rows": rows}
        try:
            await self._monitor.execute("chardev-window-size-changed", size)
        except (QmpError, Timeout, NotConnected):
            self._ask_qemu = False

    def close(self) -> None:
        """Close the socket."""
        if self._port is not None:
            self._port.close()
            self._port = None
