# SPDX-License-Identifier: LGPL-2.1-or-later
"""Runs commands on one of QEMU's QMP monitors with timeouts, and passes QEMU's events to any number of listeners.

The protocol is QEMU's docs/interop/qmp-spec.rst. The manager uses this connection; QMP clients share another monitor
(`share/multiplexer.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from ..aio.writer import Message, Writer
from ..errors import NotConnected, QmpError, Timeout
from .events import Event, EventStream
from .limits import GREETING_TIMEOUT
from .transcript import Transcript

#: Seconds for the reply to the manager's commands, all of which are quick: a QEMU that takes longer hangs. Clients get
#: the error before their own timeout, which is 45 s for sd-varlink.
COMMAND_TIMEOUT = 20.0

_RECEIVE_SIZE = 65536

#: The id of qmp_capabilities, the only command with an id. QEMU runs one command at a time, over all monitors, and
#: replies in order (its docs/interop/qmp-spec.rst). So replies before the one with this id are for the monitor's
#: previous client, and later commands need no ids, which saves time: QEMU takes 4 µs to read a byte.
_FIRST_ID = 0


class Command(NamedTuple):
    """A QMP command with its arguments. `fds` are passed by SCM_RIGHTS; the caller keeps them."""

    name: str
    arguments: Mapping[str, object] | None = None
    fds: Sequence[int] = ()


class _Received(msgspec.Struct):
    """Any message of a monitor (docs/interop/qmp-spec.rst)."""

    QMP: dict[str, Any] | None = None
    # `return` is a keyword of Python.
    result: Any = msgspec.field(default=msgspec.UNSET, name="return")
    error: dict[str, str] | None = None
    id: int | None = None
    event: str | None = None
    data: dict[str, Any] | None = None
    timestamp: dict[str, int] | None = None


class _Replies:
    """The replies to commands that were sent together. The sender is woken once, by the last expected reply."""

    __slots__ = ("_expected", "_found", "all")

    def __init__(self, expected: int, future: asyncio.Future[list[Any]]) -> None:
        self.all = future
        self._expected = expected
        self._found: list[Any] = []

    def put(self, result: Any) -> None:
        """Add the next reply."""
        self._found.append(result)
        # No task waits for replies after their deadline, nor for replies to commands `behind`.
        if len(self._found) == self._expected and not self.all.done():
            self.all.set_result(self._found)


class _Pending(NamedTuple):
    """A command without a reply, the batch that it was sent with, and the collector of its reply."""

    command: str
    batch: _Batch
    replies: _Replies


class _Batch:
    """Commands that go to QEMU in one message, with descriptors for one of them."""

    __slots__ = ("data", "fds", "message")

    def __init__(self, fds: Sequence[int]) -> None:
        self.data = b""
        self.fds = fds
        #: The message in the write queue, or None before it is queued.
        self.message: Message | None = None


class Monitor:
    """A client of one QMP monitor, which negotiates by itself. Takes ownership of the socket."""

    def __init__(
        self, connected: socket.socket, *, received: bytes = b"", transcript: Transcript | None = None, name: str = ""
    ) -> None:
        """Negotiate. `received` was read from the socket already. Messages go into `transcript` under `name`."""
        connected.setblocking(False)
        self._socket = connected
        self._loop = asyncio.get_running_loop()
        self._buffer = bytearray()
        self._transcript = transcript
        self._name = name
        self._decoder = msgspec.json.Decoder(_Received)
        # QEMU's greeting, or None before it has come.
        self._greeting: dict[str, Any] | None = None
        self._negotiated = asyncio.Event()
        # The commands without a reply, in the order of sending.
        self._pending: deque[_Pending] = deque()
        self._writer = Writer.of_socket(connected, on_lost=self._on_lost)
        self._streams: set[EventStream] = set()
        self._listeners: list[Callable[[Event], None]] = []
        self._witnesses: list[Callable[[Event], None]] = []
        self._lost: str | None = None
        # The task that holds the monitor, and the event that other tasks wait for.
        self._holder: asyncio.Task[object] | None = None
        self._released = asyncio.Event()
        #: Set when the connection is closed.
        self.closed = asyncio.Event()
        self._loop.add_reader(connected, self._readable)
        if received:
            self._loop.call_soon(self._received, received)

    def __repr__(self) -> str:
        return f"<QMP connection, {'open' if self._lost is None else f'closed: {self._lost}'}>"

    async def greeting(self, *, timeout: float = GREETING_TIMEOUT) -> dict[str, Any]:
        """Wait for QEMU's greeting and the negotiation; returns the greeting.

        Raises Timeout if no greeting comes, NotConnected if QEMU disconnects.
        """
        try:
            async with asyncio.timeout(timeout):
                await self._negotiated.wait()
        except TimeoutError:
            raise Timeout(
                f"QEMU's monitor gave no greeting within {timeout:g} s; another program may be connected to it"
            ) from None
        if self._lost is not None or self._greeting is None:
            raise NotConnected(self._lost or "QEMU sent no greeting")
        return self._greeting

    async def execute(
        self,
        command: str,
        arguments: Mapping[str, object] | None = None,
        *,
        fds: Sequence[int] = (),
        timeout: float = COMMAND_TIMEOUT,
        urgent: bool = False,
    ) -> Any:
        """Run a command and return QEMU's result. Waits for the negotiation first.

        `fds` are passed by SCM_RIGHTS; the caller keeps them, and QEMU has duplicates after the reply. An `urgent`
        command does not wait for a task that holds the monitor. Raises QmpError with QEMU's error, Timeout if no reply
        comes in time, NotConnected if QEMU disconnects.
        """
        (result,) = await self.execute_all([Command(command, arguments, fds)], timeout=timeout, urgent=urgent)
        if isinstance(result, QmpError):
            raise result
        return result

    async def execute_all(
        self,
        commands: Sequence[Command],
        *,
        behind: Sequence[Command] = (),
        timeout: float = COMMAND_TIMEOUT,
        urgent: bool = False,
    ) -> list[Any]:
        """Send commands together; returns a result for each, which is a QmpError if QEMU refused the command.

        QEMU runs all commands in order, even if one fails, so the commands after a failed one must be harmless.
        Commands `behind` are sent too, and QEMU runs them before any later commands, but this method does not wait for
        their replies.
        Raises Timeout or NotConnected like `execute`.
        """
        while self._holder not in (None, asyncio.current_task()) and not urgent:
            await self._released.wait()
        try:
            async with asyncio.timeout(timeout):
                await self._negotiated.wait()
                return await self._run(commands, behind)
        except TimeoutError:
            names = ", ".join(dict.fromkeys(command.name for command in commands))
            raise Timeout(f"QEMU did not answer {names} within {timeout:g} s") from None

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Hold the monitor: until the end of the context, only the calling task's and urgent commands go to QEMU."""
        self._holder = asyncio.current_task()
        self._released.clear()
        try:
            yield
        finally:
            self._holder = None
            self._released.set()

    def events(self) -> EventStream:
        """Open a stream of the events from now on. The caller closes the stream, or uses it in `with`."""
        stream = EventStream(self._streams.discard)
        if self._lost is None:
            self._streams.add(stream)
        else:
            stream.close()
        return stream

    def witness(self, on_event: Callable[[Event], None]) -> None:
        """Call `on_event` with each event of QEMU and vmspawn from now on. `on_event` must not raise."""
        self._witnesses.append(on_event)

    def listen(self, on_event: Callable[[Event], None]) -> None:
        """Call `on_event` with each event of QEMU when it is read, before all streams. `on_event` must not raise."""
        self._listeners.append(on_event)

    def publish(self, event: Event) -> None:
        """Put an event of vmspawn into the streams, in order with QEMU's events."""
        for on_event in self._witnesses:
            on_event(event)
        for stream in tuple(self._streams):
            stream.put(event)

    def close(self, why: str = "the monitor was closed") -> None:
        """Close the connection. Commands in flight raise NotConnected with the reason `why`."""
        if self._socket.fileno() < 0:
            return
        self._loop.remove_reader(self._socket)
        self._writer.close()
        self._socket.close()
        self._lost = why
        error = NotConnected(why)
        for future in [each.replies.all for each in self._pending]:
            if not future.done():
                future.set_exception(error)
                future.exception()  # without a waiting task, asyncio would log the exception
        self._pending.clear()
        self._released.set()
        self._holder = None
        self._negotiated.set()  # waiting tasks then raise NotConnected
        for stream in tuple(self._streams):
            stream.close()
        self.closed.set()

    # Sending.

    async def _run(self, commands: Sequence[Command], behind: Sequence[Command]) -> list[Any]:
        """Send all commands, and wait for the replies to `commands`."""
        if self._lost is not None:
            raise NotConnected(self._lost)
        if not commands:
            return []
        sent = (*commands, *behind)
        encoded = [_encode(command) for command in sent]
        batches: list[_Batch] = []
        replies = _Replies(len(commands), self._loop.create_future())
        for command, data in zip(sent, encoded, strict=True):
            # QEMU keeps the descriptors of the last sendmsg(2) only, for the next command that takes one.
            if command.fds or not batches:
                batches.append(_Batch(command.fds))
            batches[-1].data += data
            self._pending.append(_Pending(command.name, batches[-1], replies))
            self._record_sent(data)
        for batch in batches:
            batch.message = self._writer.write_message(batch.data, batch.fds)
        try:
            return await replies.all
        finally:
            self._withdraw(batches)

    def _negotiate(self, greeting: dict[str, Any]) -> None:
        """Reply to the first greeting. QEMU 7.2 sends two to a client that connects while it opens the monitor."""
        if self._greeting is None:
            self._greeting = greeting
            data = msgspec.json.encode({"execute": "qmp_capabilities", "id": _FIRST_ID})
            self._record_sent(data)
            self._writer.write(data)

    def _record_sent(self, data: bytes) -> None:
        if self._transcript is not None:
            self._transcript.sent(self._name, data)

    def _withdraw(self, batches: Sequence[_Batch]) -> None:
        """Withdraw unsent commands of a caller that was cancelled, because the caller closes their descriptors.

        A batch that was sent in part is completed, and its replies will come.
        """
        for batch in batches:
            if batch.message is not None and self._writer.withdraw(batch.message):
                self._pending = deque(each for each in self._pending if each.batch is not batch)

    def _on_lost(self, error: OSError) -> None:
        self.close(f"QEMU closed its monitor ({error.strerror})")

    # Receiving.

    def _readable(self) -> None:
        try:
            data = self._socket.recv(_RECEIVE_SIZE)
        except BlockingIOError:
            return
        except OSError as error:
            self.close(f"QEMU closed its monitor ({error.strerror})")
            return
        if not data:
            self.close("QEMU closed its monitor")
            return
        self._received(data)

    def _received(self, data: bytes) -> None:
        self._buffer += data
        # QEMU ends each message with CR LF, and escapes both inside strings.
        if b"\n" not in data:
            return
        *lines, rest = self._buffer.split(b"\n")
        self._buffer = rest
        for line in lines:
            self._dispatch(bytes(line))

    def _dispatch(self, line: bytes) -> None:
        if self._transcript is not None:
            self._transcript.received(self._name, line)
        try:
            message = self._decoder.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            self.close(f"QEMU sent an invalid QMP message ({error})")
            return
        if message.event is not None:
            self._event(Event(message.event, message.data, message.timestamp))
        elif message.QMP is not None:
            self._negotiate(message.QMP)
        else:
            self._reply(message)

    def _event(self, event: Event) -> None:
        for on_event in self._listeners:
            on_event(event)
        self.publish(event)

    def _reply(self, message: _Received) -> None:
        if not self._negotiated.is_set():
            if message.id == _FIRST_ID:
                self._negotiated.set()
            return
        if not self._pending:
            return
        pending = self._pending.popleft()
        if message.error is not None:
            error = message.error
            pending.replies.put(QmpError(pending.command, error.get("class", "GenericError"), error.get("desc", "")))
        else:
            pending.replies.put(None if message.result is msgspec.UNSET else message.result)


def _encode(command: Command) -> bytes:
    message: dict[str, object] = {"execute": command.name}
    if command.arguments:
        message["arguments"] = command.arguments
    return msgspec.json.encode(message)
