# SPDX-License-Identifier: LGPL-2.1-or-later
"""Serves one QMP client in the way that a separate QEMU monitor would.

A session does the same as QEMU for each monitor: it greets, negotiates, cuts the input into messages, keeps the order,
and replies to messages that are not commands (docs/interop/qmp-spec.rst, monitor/qmp.c). It takes no further message
while a command runs, so the socket is the queue. Only a client that has enabled `oob` may have more commands waiting.
"""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from collections.abc import Callable
from enum import Enum, auto
from typing import Literal, NamedTuple

import msgspec

from .. import limits
from ..saving import Saving
from ..syntax import replies
from ..syntax.envelope import USUAL, Command, Refusal, read, usual
from ..syntax.replies import COMMAND_NOT_FOUND, Reply
from ..syntax.scanner import Scanner
from . import crashes, read_only, sandbox
from .connection import Connection
from .descriptors import CONSUMING, WATCHED, Descriptors
from .negotiation import Greeting
from .passed import PassedDescriptors, close
from .peer import Peer
from .schedule import Schedule
from .upstream import Call

_NEGOTIATION = b"qmp_capabilities"


class State(Enum):
    """The state of a session."""

    NEGOTIATING = auto()
    READY = auto()
    #: The session takes no more input, and closes the connection when the client has read all output.
    LEAVING = auto()
    CLOSED = auto()


class _Enable(msgspec.Struct, forbid_unknown_fields=True):
    """The arguments of qmp_capabilities that QEMU is certain to accept."""

    enable: list[Literal["oob"]] = []


class Shared(NamedTuple):
    """The objects that all sessions of a multiplexer use."""

    greeting: Greeting
    schedule: Schedule
    descriptors: Descriptors
    saving: Saving
    #: False if QEMU's sandbox forbids QEMU to start programs.
    may_spawn: bool


class Session:
    """A client of the multiplexer. `Multiplexer.open` makes it.

    Owns its socket, and each descriptor that the client passes, until the command that uses the descriptor is answered.
    """

    __slots__ = (
        "_connection", "_has_ended", "_has_oob", "_is_saving", "_is_scheduled", "_loop", "_on_left", "_overtaking",
        "_passed", "_queue", "_running", "_scanner", "_schedule", "_shared", "bytes_in", "commands", "events", "peer",
        "read_only", "state",
    )  # fmt: skip

    def __init__(
        self,
        connected: socket.socket,
        shared: Shared,
        *,
        on_left: Callable[[Session], None],
        read_only: bool,
        peer: Peer | None,
        initial: bytes,
    ) -> None:
        """Greet the client, and take `initial`, which was read from the socket already.

        `on_left` is called once, after the client's disconnect, when no command of the session is in flight any more.
        """
        self._connection = Connection(
            connected,
            on_received=self._on_received,
            on_end=self._on_end,
            on_drained=self._advance,
            on_gone=self._on_gone,
        )
        self._shared = shared
        self._schedule = shared.schedule
        self._on_left = on_left
        self._loop = asyncio.get_running_loop()
        self._scanner = Scanner(shared.greeting.dialect)
        self._passed = PassedDescriptors()
        # True if the client has enabled out-of-band commands.
        self._has_oob = False
        # The in-band command in flight, the commands that wait for it, and the out-of-band command in flight.
        self._running: Call | None = None
        self._queue: deque[Command | Refusal] = deque()
        self._overtaking: Call | None = None
        # True from the first question to QEMU about a command that saves the state, until the reply to the command.
        self._is_saving = False
        # True if the client has closed its sending side.
        self._has_ended = False
        # True if `_resume` is scheduled, after the other sessions' turn.
        self._is_scheduled = False
        #: The client's process, if known.
        self.peer = peer
        #: True if the session may only run commands that change nothing.
        self.read_only = read_only
        self.state = State.NEGOTIATING
        #: The numbers of commands that were run for the client, and of events that it was sent.
        self.commands = self.events = 0
        #: The number of bytes that the client has sent.
        self.bytes_in = 0
        self._connection.write(shared.greeting.line)
        self._connection.read(True)
        if initial:
            # The multiplexer must know the session before the session calls it.
            self._loop.call_soon(self._on_received, initial, -1)

    @property
    def queued(self) -> int:
        """The number of the session's commands without a reply."""
        return len(self._queue) + (self._overtaking is not None) + (self._running is not None)

    @property
    def _is_in_flight(self) -> bool:
        return self._running is not None or self._overtaking is not None

    @property
    def bytes_out(self) -> int:
        """The number of bytes that were sent or queued for the client."""
        return self._connection.written

    @property
    def unread(self) -> int:
        """The number of bytes that are queued for the client."""
        return self._connection.waiting

    def event(self, line: bytes) -> None:
        """Send QEMU's event to the client."""
        if self.state is State.READY:
            self.events += 1
            self._connection.write(line)

    def end(self) -> None:
        """End the session after QEMU's exit. The client gets its queued output, then end of file."""
        self._abandon()
        if self.state is State.CLOSED:
            self._on_left(self)
        else:
            self.state = State.LEAVING
            self._connection.finish(timeout=limits.DRAIN_TIMEOUT)

    def close(self) -> None:
        """Disconnect the client."""
        self._connection.close()
        self._on_gone()

    # Input from the client.

    def _on_received(self, data: bytes, fd: int) -> None:
        if fd >= 0:
            self._passed.receive(fd, self.bytes_in)
        self.bytes_in += len(data)
        if (
            fd < 0
            and self._running is None
            and self._overtaking is None
            and self.state is State.READY
            and self._connection.waiting <= limits.OUTPUT_HELD
        ):
            # Nearly all input takes this path. It is short, because the processor's caches hold little of the code
            # after a wait for a client.
            captured = self._scanner.take_whole(USUAL, data)
            if captured is not None:
                return self._run(usual(captured))
        self._scanner.feed(data)
        self._advance()

    def _on_end(self) -> None:
        self._has_ended = True
        self._advance()

    def _advance(self) -> None:
        """Take messages as long as QEMU would, but not so many that other sessions are delayed."""
        taken = 0
        while self._may_take():
            if taken == limits.MESSAGES_PER_TURN:
                self._again()
                break
            taken += 1
            item = self._item()
            if item is None:
                self._starved()
                break
            if self._passed.arriving >= 0:
                self._passed.scanned(self._scanner.offset)
            self._take(item)
        if self.state is State.NEGOTIATING or self.state is State.READY:
            self._connection.read(self._wants_input())

    def _may_take(self) -> bool:
        if self._connection.waiting > limits.OUTPUT_HELD:
            # The session takes requests again when the client has read all output.
            return False
        if self._has_oob:
            # QEMU runs an out-of-band command before it reads more.
            return self._overtaking is None and len(self._queue) < limits.OOB_QUEUE and self.state is State.READY
        return self._running is None and (self.state is State.READY or self.state is State.NEGOTIATING)

    def _wants_input(self) -> bool:
        if self._has_ended:
            return False
        if self._may_take() and not self._is_scheduled:
            return True
        is_held_back = self._connection.waiting > limits.OUTPUT_HELD
        ahead = limits.INPUT_HELD if is_held_back else limits.READ_AHEAD
        return self._scanner.pending < ahead and self._passed.arriving < 0

    def _again(self) -> None:
        if not self._is_scheduled:
            self._is_scheduled = True
            self._loop.call_soon(self._resume)

    def _resume(self) -> None:
        self._is_scheduled = False
        self._advance()

    def _starved(self) -> None:
        """Handle input without a complete message."""
        if self._scanner.is_busy:
            return self._again()
        self._passed.settle()
        if self._has_ended and not self._is_in_flight:
            self.state = State.LEAVING
            self._connection.finish(timeout=None)

    # Messages.

    def _item(self) -> Command | Refusal | None:
        captured = self._scanner.take(USUAL)
        if captured is not None:
            return usual(captured)
        message = self._scanner.next()
        return None if message is None else read(message, oob=self._has_oob)

    def _take(self, item: Command | Refusal) -> None:
        if (self._running is None and not self._queue) or item.is_oob:
            self._do(item)
        else:
            self._queue.append(item)

    def _do(self, item: Command | Refusal) -> None:
        if isinstance(item, Refusal):
            self._connection.write(item.line)
        elif self.state is State.NEGOTIATING:
            self._negotiate(item)
        else:
            self._run(item)

    def _run(self, command: Command) -> None:
        self.commands += 1
        if self.read_only and not read_only.allows(command.name):
            return self._connection.write(replies.failure(read_only.refusal(command.name), id=command.id))
        if not self._shared.may_spawn and command.name in sandbox.STARTERS:
            problem = sandbox.refusal(command)
            if problem is not None:
                return self._connection.write(replies.failure(problem, id=command.id))
        if command.name in crashes.RULES and not command.is_oob:
            if crashes.is_save(command):
                self._shared.saving.begin()
                self._is_saving = True
            return self._inquire(command, crashes.questions(command, self._shared.saving), None)
        self._submit(command)

    def _submit(self, command: Command) -> None:
        is_save = self._is_saving and not command.is_oob
        call = Call(command, self._on_saved if is_save else self._on_reply)
        if _is_watched(command):
            problem = self._shared.descriptors.claim(self, command)
            if problem is not None:
                return self._connection.write(replies.failure(problem, id=command.id))
            if command.name in CONSUMING:
                call.is_taking_descriptor = True
                call.fd = self._passed.take()
        if command.is_oob:
            self._overtaking = call
        else:
            self._running = call
        if len(command.body) > limits.BULK_SIZE and self._is_movable(call):
            self._schedule.submit_large(call)
        else:
            self._schedule.submit(call)

    def _inquire(self, command: Command, questions: crashes.Questions, answer: object) -> None:
        """Send QEMU the next question about a waiting command; after the last answer, run or refuse the command."""
        try:
            body = questions.send(answer)
        except StopIteration as end:
            self._running = None
            if end.value is None:
                return self._submit(command)
            self._end_saving()
            self._connection.write(replies.failure(end.value, id=command.id))
            return self._next()

        def on_answer(_: Call, reply: Reply) -> None:
            if self.state is State.CLOSED:
                self._running = None
                self._end_saving()
                return self._check_left()
            self._inquire(command, questions, replies.returned(reply))

        self._running = Call(Command(body), on_answer)
        self._schedule.submit(self._running)

    def _end_saving(self) -> None:
        if self._is_saving:
            self._is_saving = False
            self._shared.saving.end()

    def _on_saved(self, call: Call, reply: Reply) -> None:
        """Handle the reply to a command that saves the state."""
        self._end_saving()
        self._on_reply(call, reply)

    def _is_movable(self, call: Call) -> bool:
        """Return whether a large command may go to another monitor, which lacks this monitor's descriptors."""
        return not (call.is_taking_descriptor or call.command.is_oob or self._shared.descriptors.holds_names(self))

    def _on_reply(self, call: Call, reply: Reply) -> None:
        command = call.command
        if _is_watched(command):
            self._settle(call, command, reply)
        if command.is_oob:
            self._overtaking = None
        else:
            self._running = None
        if self.state is State.CLOSED:
            return self._check_left()
        # QEMU could not read the id of a command that it could not parse.
        unparsed = command.is_doubtful and reply.id < 0
        self._connection.write(reply.labelled(None if unparsed else command.id))
        if self._queue or self._has_ended or self._scanner.pending:
            self._next()

    def _next(self) -> None:
        while self._queue and self._running is None and self.state is State.READY:
            self._do(self._queue.popleft())
        self._advance()

    def _settle(self, call: Call, command: Command, reply: Reply) -> None:
        self._shared.descriptors.settle(self, command, reply)
        if call.is_descriptor_left and self.state is not State.CLOSED:
            self._passed.give_back(call.fd)
        else:
            close(call.fd)
        call.fd = -1

    # The negotiation with the client. QEMU's monitor has been negotiated already.

    def _negotiate(self, command: Command) -> None:
        if command.name != _NEGOTIATION:
            problem = f"Expecting capabilities negotiation with '{_NEGOTIATION.decode()}'"
            return self._connection.write(replies.failure(problem, error_class=COMMAND_NOT_FOUND, id=command.id))
        try:
            wanted = msgspec.json.decode(command.arguments or b"{}", type=_Enable).enable
        except msgspec.DecodeError:
            return self._ask(command)
        self._accept(command, oob=bool(wanted))

    def _ask(self, command: Command) -> None:
        """Let QEMU check the arguments. If they are valid, QEMU's error is that the monitor has negotiated already."""
        self._running = Call(command, self._on_checked)
        self._schedule.submit(self._running)

    def _on_checked(self, call: Call, reply: Reply) -> None:
        command = call.command
        self._running = None
        if self.state is State.CLOSED:
            return self._check_left()
        if replies.failure_of(reply).error_class == COMMAND_NOT_FOUND:
            self._accept(command, oob=b'"oob"' in command.arguments)
        else:
            self._connection.write(reply.labelled(None if command.is_doubtful and reply.id < 0 else command.id))
        self._advance()

    def _accept(self, command: Command, *, oob: bool) -> None:
        if oob and not self._shared.greeting.has_oob:
            return self._connection.write(replies.failure("Capability oob not available", id=command.id))
        self._has_oob = oob
        self.state = State.READY
        self._connection.write(replies.success(command.id))

    # The end.

    def _on_gone(self) -> None:
        """Drop the commands of a disconnected client, except those in flight, whose replies are ignored."""
        if self.state is State.CLOSED:
            return
        self.state = State.CLOSED
        if self._running is not None and self._schedule.withdraw(self._running):
            close(self._running.fd)
            self._running = None
            self._end_saving()
        self._queue.clear()
        self._passed.close()
        self._check_left()

    def _check_left(self) -> None:
        if not self._is_in_flight:
            self._on_left(self)

    def _abandon(self) -> None:
        """Forget the commands in flight, which QEMU will not answer."""
        if self._running is not None:
            close(self._running.fd)
        self._running = self._overtaking = None
        self._end_saving()
        self._queue.clear()


def _is_watched(command: Command) -> bool:
    # QEMU runs none of these commands out of band, and then does not use a descriptor either.
    return command.name in WATCHED and not command.is_oob
