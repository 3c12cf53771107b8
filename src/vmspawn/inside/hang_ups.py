# SPDX-License-Identifier: LGPL-2.1-or-later
"""Notices that the far end of a Unix socket was closed or shut down, without reading the data in the socket."""

from __future__ import annotations

import asyncio
import fcntl
import select
import socket
import struct
import termios
from collections.abc import Callable

_INT = struct.Struct("i")


class HangUps:
    """Watches the far ends of sockets. The caller owns the sockets, and calls `forget` before it closes one."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._epoll = select.epoll()
        self._callbacks: dict[int, Callable[[], None]] = {}
        self._loop.add_reader(self._epoll.fileno(), self._on_events)

    def watch(self, connected: socket.socket, on_hang_up: Callable[[], None]) -> None:
        """Call `on_hang_up` once when the far end sends no more."""
        self._callbacks[connected.fileno()] = on_hang_up
        self._epoll.register(connected, select.EPOLLRDHUP)

    def forget(self, connected: socket.socket) -> None:
        """Stop watching a socket, if it is watched."""
        # epoll watches a closed descriptor as long as another process has a copy.
        if self._callbacks.pop(connected.fileno(), None) is not None:
            self._epoll.unregister(connected)

    def _on_events(self) -> None:
        for fd, _ in self._epoll.poll(0):
            if (on_hang_up := self._callbacks.pop(fd, None)) is not None:
                self._epoll.unregister(fd)
                on_hang_up()

    def close(self) -> None:
        """Stop watching. May be called again."""
        if not self._epoll.closed:
            self._loop.remove_reader(self._epoll.fileno())
            self._epoll.close()
            self._callbacks.clear()


def unread(connected: socket.socket) -> int:
    """Return how many bytes wait to be read from a socket."""
    size: int = _INT.unpack(fcntl.ioctl(connected, termios.FIONREAD, bytes(_INT.size)))[0]
    return size
