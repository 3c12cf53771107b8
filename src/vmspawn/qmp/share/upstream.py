# SPDX-License-Identifier: LGPL-2.1-or-later
"""One of QEMU's monitors: commands out, replies and events in.

QEMU reads a monitor byte by byte, about 4.4 us each, so what it is sent is short: no white space, recycled ids of a
digit or two, and none at all for one of the commands in flight, whose reply is the one without. Two commands without an
id are never in flight together, so no order of replies is relied on.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from ...aio.writer import Writer
from ...errors import NotConnected, Timeout
from ..limits import IN_FLIGHT, RECEIVE_SIZE
from ..syntax import replies
from ..syntax.dialect import PROBE, Dialect, dialect_of
from ..syntax.envelope import Command
from ..syntax.replies import Reply
from ..transcript import Transcript

#: How a message ends, and how it does on a monitor with `pretty=on`, where it has several lines.
_END = b"\r\n"
_PRETTY_END = b"\r\n}\r\n"


class Call(msgspec.Struct, eq=False):
    """A command on its way through QEMU, from when it waits to when its reply has come."""

    command: Command
    #: Called with the reply. Its id is None if QEMU could not parse a doubtful command.
    answered: Callable[[Call, Reply], None]
    #: Whether QEMU takes a descriptor for it.
    consumes: bool = False
    #: The descriptor to send along, or -1. It must stay open until the reply, and is not closed here.
    fd: int = -1
    #: Whether QEMU failed before it took the descriptor.
    unused: bool = False
    #: The id under which it is in flight, or -1.
    number: int = -1


@dataclass(frozen=True, slots=True)
class Greeting:
    """What a monitor is found to be before the negotiation."""

    #: The greeting as it came.
    line: bytes
    #: Whether it offers out-of-band execution.
    oob: bool
    dialect: Dialect


class _Capabilities(msgspec.Struct):
    capabilities: list[str]


class _Hello(msgspec.Struct):
    QMP: _Capabilities


class Upstream:
    """A monitor that QEMU serves. Owns the connected socket that it is given, and closes it in `close`."""

    __slots__ = (
        "_end",
        "_event",
        "_free",
        "_input",
        "_loop",
        "_lost",
        "_name",
        "_named",
        "_next",
        "_socket",
        "_transcript",
        "_unnamed",
        "_writer",
        "idle",
        "in_flight",
    )  # fmt: skip

    def __init__(
        self,
        connected: socket.socket,
        *,
        event: Callable[[bytes], None],
        lost: Callable[[str], None],
        transcript: Transcript | None = None,
        name: str = "",
    ) -> None:
        """`event` gets each event's line, `lost` is called once when QEMU has closed the connection. What is said goes
        into `transcript` under `name`."""
        self._transcript = transcript
        self._name = name
        connected.setblocking(False)
        self._socket = connected
        self._loop = asyncio.get_running_loop()
        self._event = event
        self._lost = lost
        self._end = _END
        # What came of a message that is not complete.
        self._input = bytearray()
        # That QEMU is gone is for the reader to find, after what QEMU said before.
        self._writer = Writer.of_socket(connected)
        # Who a reply without an id is for.
        self._unnamed: Call | None = None
        self._named: dict[int, Call] = {}
        # Ids that are free again, and the smallest that was never used.
        self._free: list[int] = []
        self._next = 0
        #: In-band commands whose reply has not come.
        self.in_flight = 0
        #: Called when all replies that came together were handed out.
        self.idle: Callable[[], None] = lambda: None

    # The beginning.

    async def start(self, timeout: float) -> Greeting:
        """Wait for the greeting, negotiate with all that is offered, and begin to receive.

        Raises Timeout if QEMU says nothing in so many seconds, NotConnected if it is gone or speaks no QMP.
        """
        try:
            async with asyncio.timeout(timeout):
                line = await self._first_line()
        except TimeoutError:
            raise Timeout(
                f"the monitor gave no greeting within {timeout:g} s",
                hint="QEMU serves one client at a time: close the program that holds this socket.",
            ) from None
        try:
            async with asyncio.timeout(timeout):
                greeting = await self._negotiate(line)
        except TimeoutError:
            raise Timeout(f"the monitor did not answer the negotiation within {timeout:g} s") from None
        self._loop.add_reader(self._socket, self._readable)
        return greeting

    async def _first_line(self) -> bytes:
        start = await self._more()
        if start.startswith(b"{\r\n"):
            self._end = _PRETTY_END
        return await self._line()

    async def _negotiate(self, greeting: bytes) -> Greeting:
        try:
            oob = "oob" in msgspec.json.decode(greeting, type=_Hello).QMP.capabilities
        except msgspec.DecodeError:
            raise NotConnected("what answers on the socket is no QMP monitor") from None
        await self._say(PROBE)
        problem = replies.read(await self._answer())
        enable = b',"arguments":{"enable":["oob"]}' if oob else b""
        await self._say(b'{"execute":"qmp_capabilities"' + enable + b"}")
        answer = replies.read(await self._answer())
        if problem is None or answer is None or not problem.failed or answer.failed:
            raise NotConnected("the monitor refused the negotiation")
        return Greeting(greeting, oob, dialect_of(replies.failure_of(problem).description))

    async def _say(self, data: bytes) -> None:
        try:
            await self._loop.sock_sendall(self._socket, data)
        except OSError as error:
            raise NotConnected(f"QEMU closed its monitor: {error.strerror}") from None

    async def _answer(self) -> bytes:
        """The next message that is no greeting: QEMU 7.2 sends two to who connects just as it opens its monitor."""
        while True:
            line = await self._line()
            try:
                msgspec.json.decode(line, type=_Hello)
            except msgspec.DecodeError:
                return line

    async def _line(self) -> bytes:
        """The next message, before the reader is there."""
        while self._end not in self._input:
            await self._more()
        return self._take(self._input.index(self._end) + len(self._end))

    async def _more(self) -> bytearray:
        try:
            data = await self._loop.sock_recv(self._socket, RECEIVE_SIZE)
        except OSError as error:
            raise NotConnected(f"QEMU closed its monitor: {error.strerror}") from None
        if not data:
            raise NotConnected("QEMU closed its monitor")
        self._input += data
        return self._input

    # Sending.

    @property
    def has_room(self) -> bool:
        """Whether an in-band command may be sent now, if it is an ordinary one."""
        return self.in_flight < IN_FLIGHT

    def can_take(self, command: Command) -> bool:
        """Whether a command may be sent now."""
        return (self.in_flight < IN_FLIGHT or command.oob) and (self._unnamed is None or not command.doubtful)

    def send(self, call: Call) -> None:
        """Send a command that `can_take` allowed."""
        command = call.command
        if not command.oob:
            self.in_flight += 1
        if self._unnamed is None:
            self._unnamed = call
            if not command.doubtful:
                return self._say_command(command.body + b"}", call.fd)
        if self._free:
            number = self._free.pop()
        else:
            number = self._next
            self._next += 1
        call.number = number
        self._named[number] = call
        self._say_command(b'%b,"id":%d}' % (command.body, number), call.fd)

    def _say_command(self, data: bytes, fd: int) -> None:
        if self._transcript is not None:
            self._transcript.sent(self._name, data)
        if fd < 0:
            self._writer.write(data)
        else:
            self._writer.write_message(data, (fd,))

    # Receiving.

    def _readable(self) -> None:
        try:
            data = self._socket.recv(RECEIVE_SIZE)
        except BlockingIOError:
            return
        except OSError as error:
            return self._gone(f"QEMU closed its monitor: {error.strerror}")
        if not data:
            return self._gone("QEMU closed its monitor")
        if not self._input and data.endswith(self._end) and data.find(self._end) == len(data) - len(self._end):
            self._message(data)
            return self.idle()
        searched = max(0, len(self._input) - len(self._end))
        self._input += data
        while (found := self._input.find(self._end, searched)) >= 0:
            self._message(self._take(found + len(self._end)))
            searched = 0
        self.idle()

    def _take(self, end: int) -> bytes:
        """A message that is complete."""
        message = bytes(self._input[:end])
        del self._input[:end]
        return message

    def _message(self, line: bytes) -> None:
        if self._transcript is not None:
            self._transcript.received(self._name, line)
        reply = replies.read(line)
        if reply is None:
            return self._event(line)
        call = self._unnamed if reply.id < 0 else self._named.get(reply.id)
        if call is None:
            return self._gone("QEMU sent a reply that nothing was sent for")
        if call is self._unnamed:
            self._unnamed = None
        if call.number >= 0:
            del self._named[call.number]
            self._free.append(call.number)
        if not call.command.oob:
            self.in_flight -= 1
        call.answered(call, reply)

    # The end.

    def _gone(self, why: str) -> None:
        self.close()
        self._lost(why)

    def close(self) -> None:
        """Close the connection. Commands in flight are forgotten, not answered. May be called again."""
        if self._socket.fileno() < 0:
            return
        self._loop.remove_reader(self._socket)
        self._writer.close()
        self._socket.close()
        self._input.clear()
        self._named.clear()
        self._unnamed = None
