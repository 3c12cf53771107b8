# SPDX-License-Identifier: LGPL-2.1-or-later
"""Calls methods of a machine's control socket without blocking the event loop."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

from ..errors import NotConnected, Timeout
from ..host.runtime import CONTROL
from ..host.varlink import encode
from .client import REPLY_TIMEOUT, connect
from .errors import to_exception

_RECEIVE_SIZE = 65536
_DESCRIPTORS_MAX = 8


class Reply(NamedTuple):
    """A reply's parameters and descriptors. The caller owns the descriptors."""

    parameters: dict[str, Any]
    fds: list[int]


async def call(
    machine: str,
    method: str,
    parameters: Mapping[str, object] | None = None,
    *,
    fds: Sequence[int] = (),
    timeout: float = REPLY_TIMEOUT,
) -> Reply:
    """Call a method on a new connection and return its reply. The caller keeps `fds`, which are passed to the manager.

    Raises the errors of `connect`, Timeout, or the exception that the machine's manager raised.
    """
    async with opened(machine) as connection:
        await connection.send({"method": method, "parameters": parameters or {}}, fds)
        return await in_time(connection.receive(), machine, method, timeout)


async def in_time(reply: Awaitable[Reply], machine: str, method: str, timeout: float) -> Reply:
    """Wait for a reply. Raises Timeout after `timeout` seconds, and the errors of `receive`."""
    try:
        async with asyncio.timeout(timeout):
            return await reply
    except TimeoutError:
        raise Timeout(f"machine {machine} did not answer {method} within {timeout:g} s") from None


@asynccontextmanager
async def opened(machine: str) -> AsyncIterator[Connection]:
    """Connect to a machine's control socket for the duration of the block. Raises the errors of `connect`."""
    # `connect` blocks, for example while it asks systemd-machined for a machine of systemd-vmspawn.
    connected = await asyncio.to_thread(connect, machine, CONTROL)
    connection = Connection(machine, connected)
    try:
        yield connection
    finally:
        connection.close()


class Connection:
    """A connection to a control socket. Owns the socket, and received descriptors until a reply returns them."""

    def __init__(self, machine: str, connected: socket.socket) -> None:
        connected.setblocking(False)
        self._machine = machine
        self._socket = connected
        self._buffer = bytearray()
        self._fds: list[int] = []
        self._loop = asyncio.get_running_loop()
        #: Set when there is something to read, and when the connection is closed.
        self._ready = asyncio.Event()

    async def send(self, message: Mapping[str, object], fds: Sequence[int] = ()) -> None:
        """Send a call. Raises NotConnected, UsageError."""
        data = encode(message)
        try:
            # The socket's buffer is empty, so this does not block. The kernel may accept only a part of the data.
            sent = socket.send_fds(self._socket, [data], list(fds))
            await self._loop.sock_sendall(self._socket, data[sent:])
        except OSError as error:
            raise self._lost(error) from None

    async def receive(self) -> Reply:
        """Receive the next reply. Raises NotConnected, or the exception that the machine's manager raised.

        If `close` is called meanwhile, `receive` raises NotConnected.
        """
        while b"\0" not in self._buffer:
            await self._readable()
            try:
                data, fds, _, _ = socket.recv_fds(
                    self._socket, _RECEIVE_SIZE, _DESCRIPTORS_MAX, socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                continue
            except OSError as error:
                raise self._lost(error) from None
            self._fds += fds
            if not data:
                raise NotConnected(f"machine {self._machine} closed the connection")
            self._buffer += data
        message, _, self._buffer = self._buffer.partition(b"\0")
        reply = json.loads(message)
        if name := reply.get("error"):
            raise to_exception(name, reply.get("parameters") or {})
        found, self._fds = self._fds, []
        return Reply(reply.get("parameters") or {}, found)

    def _lost(self, error: OSError) -> NotConnected:
        return NotConnected(f"lost the connection to machine {self._machine}: {error.strerror}")

    async def _readable(self) -> None:
        if self._socket.fileno() >= 0:
            self._ready.clear()
            self._loop.add_reader(self._socket, self._ready.set)
            try:
                await self._ready.wait()
            finally:
                self._stop_watching()
        if self._socket.fileno() < 0:
            raise NotConnected(f"the connection to machine {self._machine} was closed")

    def _stop_watching(self) -> None:
        if self._socket.fileno() >= 0:
            self._loop.remove_reader(self._socket)

    def close(self) -> None:
        """Close the connection. May be called again."""
        # The event loop must not watch a closed descriptor: the next connection may get its number.
        self._stop_watching()
        self._ready.set()
        self._socket.close()
        for fd in self._fds:
            os.close(fd)
        self._fds = []
