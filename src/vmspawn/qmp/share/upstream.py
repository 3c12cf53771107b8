# SPDX-License-Identifier: LGPL-2.1-or-later
"""Sends commands to one of QEMU's monitors, and passes on its replies and events.

QEMU takes about 4.4 µs to read a byte from a monitor, so commands are short: they have no white space, and no id or a
recycled id of one or two digits. At most one command in flight can get a reply without an id, so the order of replies
does not matter.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import msgspec

from ...aio.writer import Writer
from ..limits import IN_FLIGHT, RECEIVE_SIZE
from ..syntax import replies
from ..syntax.envelope import Command
from ..syntax.replies import Reply
from ..transcript import Transcript
from .negotiation import Negotiated


class Call(msgspec.Struct, eq=False):
    """A command, from the time it begins to wait until its reply."""

    command: Command
    #: Called with the reply. If QEMU could not parse the command (`Command.is_doubtful`), the reply has the id -1.
    on_reply: Callable[[Call, Reply], None]
    #: True if the command uses a descriptor.
    is_taking_descriptor: bool = False
    #: The descriptor to send with the command, or -1. Its owner keeps it open until the reply, and closes it.
    fd: int = -1
    #: True if the command failed before QEMU used the descriptor.
    is_descriptor_left: bool = False
    #: The command's id while it is in flight, or -1.
    number: int = -1


class Upstream:
    """One of QEMU's monitors, after the negotiation. Owns the socket, and closes it in `close`."""

    __slots__ = (
        "_end",
        "_free",
        "_input",
        "_loop",
        "_name",
        "_named",
        "_next",
        "_on_event",
        "_on_lost",
        "_socket",
        "_transcript",
        "_unnamed",
        "_writer",
        "in_flight",
        "on_read_complete",
    )  # fmt: skip

    def __init__(
        self,
        negotiated: Negotiated,
        *,
        on_event: Callable[[bytes], None],
        on_lost: Callable[[str], None],
        transcript: Transcript | None = None,
        name: str = "",
    ) -> None:
        """Begin to read.

        `on_event` is called with each event's line, `on_lost` once, with the reason, when QEMU has disconnected.
        Messages go into `transcript` under `name`.
        """
        self._transcript = transcript
        self._name = name
        self._socket = negotiated.connected
        self._loop = asyncio.get_running_loop()
        self._on_event = on_event
        self._on_lost = on_lost
        self._end = negotiated.end
        # The beginning of an incomplete message.
        self._input = bytearray()
        # A failed write is ignored: the reader detects QEMU's exit, after QEMU's last messages.
        self._writer = Writer.of_socket(self._socket)
        # The command in flight that can get a reply without an id: it was sent without an id, or is doubtful.
        self._unnamed: Call | None = None
        self._named: dict[int, Call] = {}
        # The ids that are free again, and the smallest unused id.
        self._free: list[int] = []
        self._next = 0
        #: The number of in-band commands in flight.
        self.in_flight = 0
        #: Called when all messages that were read together have been passed on.
        self.on_read_complete: Callable[[], None] = lambda: None
        self._loop.add_reader(self._socket, self._readable)
        if negotiated.received:
            self._loop.call_soon(self._received, negotiated.received)

    # Sending.

    @property
    def has_room(self) -> bool:
        """True if an in-band command that is not doubtful may be sent now."""
        return self.in_flight < IN_FLIGHT

    @property
    def is_idle(self) -> bool:
        """True if QEMU has answered all commands."""
        return self._unnamed is None and not self._named

    def can_take(self, command: Command) -> bool:
        """Return whether a command may be sent now."""
        return (self.in_flight < IN_FLIGHT or command.is_oob) and (self._unnamed is None or not command.is_doubtful)

    def send(self, call: Call) -> None:
        """Send a command for which `can_take` is true."""
        command = call.command
        if not command.is_oob:
            self.in_flight += 1
        if self._unnamed is None:
            self._unnamed = call
            if not command.is_doubtful:
                return self._write_command(command.body + b"}", call.fd)
        if self._free:
            number = self._free.pop()
        else:
            number = self._next
            self._next += 1
        call.number = number
        self._named[number] = call
        self._write_command(b'%b,"id":%d}' % (command.body, number), call.fd)

    def _write_command(self, data: bytes, fd: int) -> None:
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
        self._received(data)

    def _received(self, data: bytes) -> None:
        if not self._input and data.endswith(self._end) and data.find(self._end) == len(data) - len(self._end):
            self._message(data)
            return self.on_read_complete()
        searched = max(0, len(self._input) - len(self._end))
        self._input += data
        while (found := self._input.find(self._end, searched)) >= 0:
            self._message(self._take(found + len(self._end)))
            searched = 0
        self.on_read_complete()

    def _take(self, end: int) -> bytes:
        """Remove a complete message from the input."""
        message = bytes(self._input[:end])
        del self._input[:end]
        return message

    def _message(self, line: bytes) -> None:
        if self._transcript is not None:
            self._transcript.received(self._name, line)
        reply = replies.read(line)
        if reply is None:
            return self._on_event(line)
        call = self._unnamed if reply.id < 0 else self._named.get(reply.id)
        if call is None:
            return self._gone("QEMU sent a reply without a command")
        if call is self._unnamed:
            self._unnamed = None
        if call.number >= 0:
            del self._named[call.number]
            self._free.append(call.number)
        if not call.command.is_oob:
            self.in_flight -= 1
        call.on_reply(call, reply)

    # The end.

    def _gone(self, why: str) -> None:
        self.close()
        self._on_lost(why)

    def close(self) -> None:
        """Close the connection, and forget the commands in flight. It is safe to call this again."""
        if self._socket.fileno() < 0:
            return
        self._loop.remove_reader(self._socket)
        self._writer.close()
        self._socket.close()
        self._input.clear()
        self._named.clear()
        self._unnamed = None
