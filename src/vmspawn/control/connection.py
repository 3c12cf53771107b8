# SPDX-License-Identifier: LGPL-2.1-or-later
"""Serves one Varlink connection with asyncvarlink's interfaces and conversions, and limits what a client can use.

A client is served one call at a time, and its next call is read only after the reply has been sent. So each
client uses at most one message, one call, `UNSENT_MAX` bytes of replies and the socket's buffers. The connection peeks
for the end of a message before it receives anything. So descriptors stay with their message, and all bytes behind the
message stay in the socket.
"""

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import Awaitable, Callable, Coroutine
from contextvars import ContextVar
from typing import Any

import msgspec
from asyncvarlink import (
    FileDescriptor,
    FileDescriptorArray,
    VarlinkErrorReply,
    VarlinkInterfaceRegistry,
    VarlinkMethodCall,
    VarlinkMethodReply,
    VarlinkMethodSignature,
)
from asyncvarlink.conversion import ConversionError, FileDescriptorVarlinkType
from asyncvarlink.serviceerrors import InvalidParameter, MethodNotImplemented

from ..aio.sockets import has_hung_up
from ..aio.writer import Writer
from ..errors import VmspawnError
from .errors import host_failure, package_changed, to_reply
from .upgrade import Taker, upgrader

#: The maximum length of a call in bytes. Real calls have a few hundred.
MESSAGE_MAX = 256 * 1024

#: The maximum number of descriptors in a message; the kernel passes no more at once (SCM_MAX_FD).
DESCRIPTORS_MAX = 253

#: The maximum number of bytes of unread replies: a client that reads too slowly is disconnected. Only subscribers to
#: events get so many replies.
UNSENT_MAX = 4 * 1024 * 1024

#: The connection whose call is being served, for methods that need to identify the caller.
CALLER: ContextVar[socket.socket] = ContextVar("caller")

#: Exceptions that become a reply: the errors of methods, unexpected failures of system calls (OSError), and modules
#: that are missing because the package was upgraded or removed (ImportError).
_REFUSALS = (VmspawnError, VarlinkErrorReply, OSError, ImportError)

_PEEK_SIZE = 16384
_RECEIVE_FLAGS = socket.MSG_CMSG_CLOEXEC


class _Closed(Exception):
    """The connection has ended, or must end."""


class _Descriptors(FileDescriptorArray):
    """The descriptors of a call. Negative indices, which Python would count from the end, are refused."""

    def __getitem__(self, index: int) -> FileDescriptor:
        if index < 0:
            raise IndexError(index)
        return super().__getitem__(index)


class Connection:
    """A client's connection. Owns the socket. `on_closed` is called once, when the connection is closed."""

    def __init__(
        self,
        client: socket.socket,
        registry: VarlinkInterfaceRegistry,
        on_closed: Callable[["Connection"], None],
        *,
        on_failed: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Start to serve. `on_failed` is called with a description of each call that fails."""
        self._on_failed = on_failed
        client.setblocking(False)
        self._socket = client
        # False after the connection was closed, or another protocol has got the socket.
        self._is_open = True
        self._registry = registry
        self._on_closed = on_closed
        self._loop = asyncio.get_running_loop()
        self._message = bytearray()
        self._descriptors: list[int] = []
        self._writer = Writer.of_socket(client, on_empty=self._on_sent, on_lost=lambda _: self.close())
        self._call: asyncio.Task[None] | None = None
        self._is_streaming = False
        # The function that gets the socket after everything has been sent.
        self._taker: Taker | None = None
        self._is_reading = False
        self._has_ended = False
        #: The time of the client's last message, by the monotonic clock.
        self.last_active = time.monotonic()
        self._resume_reading()

    @property
    def call(self) -> asyncio.Task[None] | None:
        """The call that is being served."""
        return self._call

    @property
    def is_busy(self) -> bool:
        """True while a call is being served."""
        return self._call is not None

    def close(self) -> None:
        """Close the connection at once. A call that is being served completes; a stream of replies is cancelled."""
        if not self._is_open:
            return
        self._stop_reading()
        self._is_open = False
        self._writer.close()
        self._socket.close()
        self._drop_descriptors()
        if self._call is not None and self._is_streaming:
            self._call.cancel()
        self._on_closed(self)

    # Reading.

    def _resume_reading(self) -> None:
        if self._is_open and not self._is_reading and not self._has_ended:
            self._is_reading = True
            self._loop.add_reader(self._socket, self._readable)

    def _stop_reading(self) -> None:
        if self._is_open and self._is_reading:
            self._is_reading = False
            self._loop.remove_reader(self._socket)

    def _readable(self) -> None:
        try:
            if self._call is not None:
                self._readable_while_busy()
            elif (message := self._receive()) is not None:
                self.last_active = time.monotonic()
                self._serve(message)
        except (_Closed, OSError):
            self.close()

    def _readable_while_busy(self) -> None:
        """Stop reading if the client sends more before it gets its reply, and handle a disconnect."""
        with contextlib.suppress(BlockingIOError):
            if self._socket.recv(1, socket.MSG_PEEK):
                self._stop_reading()
                return
            self._end_of_input()

    def _end_of_input(self) -> None:
        """Handle the end of input. The client may still read its reply, unless it has closed both directions."""
        self._has_ended = True
        self._stop_reading()
        if (self._call is None and not self._writer.pending) or has_hung_up(self._socket):
            raise _Closed

    def _receive(self) -> bytes | None:
        """Return the next complete message, or None before it has arrived. Its descriptors are in `_descriptors`."""
        try:
            peeked = self._socket.recv(_PEEK_SIZE, socket.MSG_PEEK)
        except BlockingIOError:
            return None
        if not peeked:
            self._end_of_input()
            return None
        end = peeked.find(b"\0") + 1
        data, fds, flags, _ = socket.recv_fds(self._socket, end or len(peeked), DESCRIPTORS_MAX, _RECEIVE_FLAGS)
        self._descriptors += fds
        self._message += data
        if flags & socket.MSG_CTRUNC:
            self._on_failed("lost a client's descriptors: the manager has reached its limit of open files")
            raise _Closed
        if len(self._message) > MESSAGE_MAX or len(self._descriptors) > DESCRIPTORS_MAX:
            raise _Closed
        if not end or len(data) < end:
            return None
        message = bytes(self._message[:-1])
        self._message.clear()
        return message

    def _drop_descriptors(self) -> None:
        _close_all(self._descriptors)
        self._descriptors = []

    # Serving.

    def _serve(self, message: bytes) -> None:
        """Serve a call. Invalid JSON ends the connection, because Varlink has no error for it."""
        try:
            request = msgspec.json.decode(message)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            raise _Closed from None
        if not isinstance(request, dict):
            raise _Closed
        fds, self._descriptors = self._descriptors, []
        owner = object()
        descriptors = _Descriptors(owner, fds)
        try:
            call = _parse(request)
            method, signature = self._registry.lookup_method(call)
            arguments = _convert(signature, call, descriptors)
            upgrade = upgrader(method) if call.upgrade else None
            if call.upgrade and upgrade is None:
                raise MethodNotImplemented(method=call.method)
        except VarlinkErrorReply as error:
            descriptors.release(owner)
            if request.get("oneway") is not True:
                self._send(error.tojson())
            return
        if upgrade is not None:
            self._start(self._upgrade(upgrade, call, arguments), descriptors, owner)
        elif signature.asynchronous:
            self._is_streaming = signature.more
            self._start(self._run(method, signature, call, arguments), descriptors, owner)
        else:
            self._serve_at_once(method, signature, call, arguments)
            descriptors.release(owner)

    def _serve_at_once(
        self,
        method: Callable[..., Any],
        signature: VarlinkMethodSignature,
        call: VarlinkMethodCall,
        arguments: dict[str, Any],
    ) -> None:
        try:
            result = method(**arguments)
        except _REFUSALS as error:
            self._fail(call, error)
        else:
            self._reply(call, signature, result)

    def _start(self, work: Coroutine[Any, Any, None], descriptors: FileDescriptorArray, owner: object) -> None:
        token = CALLER.set(self._socket)
        self._call = asyncio.create_task(work)
        CALLER.reset(token)
        self._call.add_done_callback(lambda _: descriptors.release(owner))
        self._call.add_done_callback(self._call_done)

    async def _run(
        self,
        method: Callable[..., Any],
        signature: VarlinkMethodSignature,
        call: VarlinkMethodCall,
        arguments: dict[str, Any],
    ) -> None:
        try:
            if signature.more:
                async with contextlib.aclosing(method(**arguments)) as replies:
                    async for result in replies:
                        self._reply(call, signature, result)
            else:
                self._reply(call, signature, await method(**arguments))
        except _REFUSALS as error:
            self._fail(call, error)

    async def _upgrade(
        self, upgrade: Callable[..., Awaitable[Taker]], call: VarlinkMethodCall, arguments: dict[str, Any]
    ) -> None:
        try:
            taker = await upgrade(**arguments)
        except _REFUSALS as error:
            self._fail(call, error)
            return
        self._taker = taker
        self._send({"parameters": {}})

    def _hand_over(self, taker: Taker) -> None:
        """Hand the socket over after the reply to an upgrade. Bytes behind the call are still in the socket."""
        self._is_open = False
        self._on_closed(self)
        taker(self._socket)

    def _call_done(self, task: asyncio.Task[None]) -> None:
        self._call = None
        if not task.cancelled() and (error := task.exception()) is not None:
            self._loop.call_exception_handler({"message": "a Varlink method failed", "exception": error})
            self.close()
        elif not self._writer.pending:
            self._go_on()

    def _go_on(self) -> None:
        """Hand the socket over, close the connection or read the next call, after a reply has been sent."""
        if self._taker is not None and self._is_open:
            self._stop_reading()
            self._hand_over(self._taker)
        elif self._has_ended:
            self.close()
        else:
            self._resume_reading()

    def _fail(self, call: VarlinkMethodCall, error: VmspawnError | VarlinkErrorReply | OSError | ImportError) -> None:
        if isinstance(error, OSError):
            error = host_failure(error)
        elif isinstance(error, ImportError):
            error = package_changed(error)
        if isinstance(error, VmspawnError):
            self._on_failed(f"{call.method.rpartition('.')[2]}: {error}")
        reply = to_reply(error, call.method_interface) if isinstance(error, VmspawnError) else error
        if not call.oneway:
            self._send(reply.tojson())

    def _reply(self, call: VarlinkMethodCall, signature: VarlinkMethodSignature, result: Any) -> None:
        if call.oneway:
            return
        owner = object()
        descriptors = FileDescriptorArray(owner)
        try:
            state = {FileDescriptorVarlinkType: descriptors}
            parameters = signature.return_type.tojson(result.parameters, state)
            reply = VarlinkMethodReply(parameters, continues=result.continues, extensions=result.extensions)
            self._send(reply.tojson(), tuple(os.dup(each.fileno()) for each in descriptors))
        finally:
            descriptors.release(owner)

    # Writing.

    def _send(self, reply: object, fds: tuple[int, ...] = ()) -> None:
        """Queue a reply and its descriptors, which are closed once sent. Disconnects a client that reads too slowly."""
        data = msgspec.json.encode(reply) + b"\0"
        if not self._is_open:
            _close_all(fds)
            return
        self._writer.write_message(data, fds, on_begun=lambda: _close_all(fds))
        if self._writer.pending > UNSENT_MAX:
            self.close()
        elif self._writer.pending:
            self._stop_reading()
        else:
            self._on_sent()

    def _on_sent(self) -> None:
        """Continue after the last queued reply has been sent."""
        if self._call is None:
            self._go_on()


def _parse(request: dict[str, Any]) -> VarlinkMethodCall:
    """Return the call in a JSON object. Raises an error that names the invalid field."""
    try:
        return VarlinkMethodCall.fromjson(request)
    except (TypeError, ValueError) as error:
        text = str(error)
        fields = ("parameters", "oneway", "more", "upgrade")
        raise InvalidParameter(parameter=next((name for name in fields if name in text), "method")) from None


def _convert(
    signature: VarlinkMethodSignature, call: VarlinkMethodCall, descriptors: FileDescriptorArray
) -> dict[str, Any]:
    try:
        arguments: dict[str, Any] = signature.parameter_type.fromjson(
            call.parameters, {FileDescriptorVarlinkType: descriptors}
        )
    except ConversionError as error:
        raise InvalidParameter(parameter=_culprit(error, signature, call)) from None
    return arguments


def _culprit(error: ConversionError, signature: VarlinkMethodSignature, call: VarlinkMethodCall) -> str:
    """Return the parameter that a conversion failed on. If the error names none, return the unknown or missing one."""
    if error.location:
        return str(error.location[0])
    unknown = [name for name in call.parameters if name in error.message]
    return unknown[0] if unknown else error.message.rpartition(" ")[2]


def _close_all(fds: tuple[int, ...] | list[int]) -> None:
    for fd in fds:
        os.close(fd)
