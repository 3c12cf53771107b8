# SPDX-License-Identifier: LGPL-2.1-or-later
"""Reads the console of a machine that another process manages."""

from __future__ import annotations

import asyncio

from ..aio.writer import Writer
from ..control.client import connect
from ..errors import NotConnected, NotSupported
from ..host.runtime import CONSOLE
from .console import Console

_RECEIVE_SIZE = 65536


class ConnectedConsole(Console):
    """A console that is read from the manager's socket. The owner must call `close`.

    Raises NotSupported if the machine does not share its console.
    """

    def __init__(self, machine: str) -> None:
        try:
            connected = connect(machine, CONSOLE)
        except NotConnected as error:
            raise NotSupported(
                f"machine {machine} shares no console: {error}",
                hint="QEMU shows the console of a machine that was started with console=native",
            ) from None
        connected.setblocking(False)
        self._socket = connected
        self._loop = asyncio.get_running_loop()
        self._queue = Writer.of_socket(connected, on_lost=lambda _: self.close())
        super().__init__(machine, self._queue.write)
        self._loop.add_reader(connected, self._on_readable)

    def _on_readable(self) -> None:
        try:
            data = self._socket.recv(_RECEIVE_SIZE)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if data:
            self.show(data)
        else:
            self.close()

    def close(self) -> None:
        """Close the connection. May be called again."""
        if self._socket.fileno() < 0:
            return
        self._queue.close()
        self._loop.remove_reader(self._socket)
        self._socket.close()
        self.finish()
