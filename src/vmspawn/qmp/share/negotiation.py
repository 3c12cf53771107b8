# SPDX-License-Identifier: LGPL-2.1-or-later
"""Negotiates with one of QEMU's monitors, and detects its capabilities and its dialect of JSON."""

from __future__ import annotations

import asyncio
import socket
from dataclasses import dataclass

import msgspec

from ...errors import NotConnected, Timeout
from ..limits import RECEIVE_SIZE
from ..syntax import replies
from ..syntax.dialect import PROBE, Dialect, dialect_of

#: The end of a message; and the end on a monitor with `pretty=on`, whose messages have several lines.
_END = b"\r\n"
_PRETTY_END = b"\r\n}\r\n"


@dataclass(frozen=True, slots=True)
class Greeting:
    """A monitor's greeting, capabilities and dialect."""

    #: The greeting as QEMU sent it.
    line: bytes
    #: True if the monitor offers out-of-band execution.
    has_oob: bool
    dialect: Dialect


@dataclass(frozen=True, slots=True)
class Negotiated:
    """A monitor after the negotiation. The holder owns the socket."""

    connected: socket.socket
    greeting: Greeting
    #: The end of each message.
    end: bytes
    #: Bytes that were read after the last reply of the negotiation.
    received: bytes


class _Capabilities(msgspec.Struct):
    capabilities: list[str]


class _Hello(msgspec.Struct):
    QMP: _Capabilities


async def negotiate(connected: socket.socket, *, timeout: float) -> Negotiated:
    """Wait for the greeting, and enable all offered capabilities. Owns the socket, and closes it after an error.

    Raises Timeout if QEMU does not reply within `timeout` seconds, NotConnected if QEMU exits, or if the program at the
    socket is not QEMU.
    """
    connected.setblocking(False)
    lines = _Lines(connected)
    try:
        async with asyncio.timeout(timeout):
            line = await lines.first()
    except TimeoutError:
        connected.close()
        raise Timeout(
            f"the monitor gave no greeting within {timeout:g} s",
            hint="QEMU serves one client at a time; close the program that uses this socket",
        ) from None
    except BaseException:
        connected.close()
        raise
    try:
        async with asyncio.timeout(timeout):
            greeting = await _negotiate(lines, line)
    except TimeoutError:
        connected.close()
        raise Timeout(f"the monitor did not answer the negotiation within {timeout:g} s") from None
    except BaseException:
        connected.close()
        raise
    return Negotiated(connected, greeting, lines.end, bytes(lines.received))


async def _negotiate(lines: _Lines, greeting: bytes) -> Greeting:
    try:
        oob = "oob" in msgspec.json.decode(greeting, type=_Hello).QMP.capabilities
    except msgspec.DecodeError:
        raise NotConnected("the program at the socket is not a QMP monitor") from None
    problem = replies.read(await lines.ask(PROBE))
    enable = b',"arguments":{"enable":["oob"]}' if oob else b""
    answer = replies.read(await lines.ask(b'{"execute":"qmp_capabilities"' + enable + b"}"))
    if problem is None or answer is None or not problem.is_error or answer.is_error:
        raise NotConnected("the monitor refused the negotiation")
    return Greeting(greeting, oob, dialect_of(replies.failure_of(problem).description))


class _Lines:
    """Reads the messages of a monitor one by one, during the negotiation, before events can come."""

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected
        self._loop = asyncio.get_running_loop()
        self.end = _END
        self.received = bytearray()

    async def first(self) -> bytes:
        """Read the greeting. Its first bytes show how each message on this monitor ends."""
        await self._receive()
        if self.received.startswith(b"{\r\n"):
            self.end = _PRETTY_END
        return await self._next()

    async def ask(self, data: bytes) -> bytes:
        """Send a command and return the next message. Skips a second greeting, which QEMU 7.2 may send."""
        try:
            await self._loop.sock_sendall(self._socket, data)
        except OSError as error:
            raise NotConnected(f"QEMU closed its monitor: {error.strerror}") from None
        while True:
            line = await self._next()
            try:
                msgspec.json.decode(line, type=_Hello)
            except msgspec.DecodeError:
                return line

    async def _next(self) -> bytes:
        while self.end not in self.received:
            await self._receive()
        length = self.received.index(self.end) + len(self.end)
        line = bytes(self.received[:length])
        del self.received[:length]
        return line

    async def _receive(self) -> None:
        try:
            data = await self._loop.sock_recv(self._socket, RECEIVE_SIZE)
        except OSError as error:
            raise NotConnected(f"QEMU closed its monitor: {error.strerror}") from None
        if not data:
            raise NotConnected("QEMU closed its monitor")
        self.received += data
