# SPDX-License-Identifier: LGPL-2.1-or-later
"""Runs QMP commands with blocking calls, parses their arguments, and relays a raw QMP stream."""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
from typing import Any

from ...console.streams import Output
from ...errors import NotConnected, QmpError, Timeout, UsageError
from ...qmp.share.read_only import allows
from .qmp_tally import Tally

_STDIN, _STDOUT = 0, 1

_RECEIVE_SIZE = 65536


def parse_arguments(words: list[str]) -> dict[str, Any]:
    """Parse a command's arguments: one JSON object, or KEY=VALUE pairs, whose values may be JSON.

    Raises UsageError.
    """
    if len(words) == 1 and words[0].startswith("{"):
        try:
            found = json.loads(words[0])
        except ValueError as error:
            raise UsageError(f"the arguments are not JSON: {error}") from None
        if isinstance(found, dict):
            return found
    arguments = {}
    for word in words:
        if word.startswith("-"):
            raise UsageError(f"the option {word} follows the command", hint="write options before the command")
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise UsageError(f"{word!r} is not an argument", hint="write KEY=VALUE, or one JSON object")
        try:
            arguments[key] = json.loads(value)
        except ValueError:
            arguments[key] = value
    return arguments


class Session:
    """A QMP session with blocking calls. The caller keeps the socket."""

    def __init__(self, connected: socket.socket, received: bytes, timeout: float) -> None:
        """Negotiate capabilities. Raises the errors of `execute`."""
        connected.settimeout(timeout)
        self._socket = connected
        self._buffer = received
        self._timeout = timeout
        self._read()
        self.execute("qmp_capabilities", {})

    def execute(self, command: str, arguments: dict[str, Any]) -> Any:
        """Run a command and return its result. Raises QmpError, Timeout or NotConnected."""
        message: dict[str, Any] = {"execute": command, "id": 0}
        if arguments:
            message["arguments"] = arguments
        try:
            # Arguments may contain bytes that the locale cannot decode. QEMU decodes UTF-8.
            self._socket.sendall(json.dumps(message, ensure_ascii=False).encode(errors="surrogateescape"))
        except OSError as error:
            raise NotConnected(f"lost the connection: {error.strerror}") from None
        while True:
            try:
                reply = self._read()
            except Timeout as error:
                if not allows(command.encode()):
                    error.hint = "the command may still take effect"
                raise
            if problem := reply.get("error"):
                raise QmpError(command, problem.get("class", ""), problem.get("desc", ""))
            if "return" in reply:
                return reply["return"]

    def _read(self) -> dict[str, Any]:
        while b"\n" not in self._buffer:
            try:
                data = self._socket.recv(_RECEIVE_SIZE)
            except TimeoutError:
                raise Timeout(f"QEMU did not answer within {self._timeout:g} s") from None
            except OSError as error:
                raise NotConnected(f"lost the connection: {error.strerror}") from None
            if not data:
                raise NotConnected("the machine ended")
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        found: dict[str, Any] = json.loads(line)
        return found


def relay(connected: socket.socket, received: bytes) -> bool:
    """Copy standard input to the socket, and the socket to standard output, until the socket ends.

    Returns whether the socket ended before standard input. Raises NotConnected if the socket ended before all input
    that was read had been sent, or after the end of the input, if a command has no reply.
    """
    connected.setblocking(False)
    output = Output(_STDOUT)
    try:
        return _Relay(connected, output, received).run()
    finally:
        output.close()


class _Relay:
    """Relays in one loop with poll(2).

    While one side accepts no data, the relay does not read from the other side. The reverse direction continues.
    """

    def __init__(self, connected: socket.socket, output: Output, received: bytes) -> None:
        self._socket = connected
        self._output = output
        self._to_socket = b""
        self._to_output = received
        self._is_input_open = True
        self._tally = Tally()
        self._tally.receive(received)
        #: The reason why sending failed, or an empty string.
        self._lost = ""

    def run(self) -> bool:
        is_open = True
        while is_open or self._to_output:
            ready = self._wait(is_open)
            if self._socket.fileno() in ready:
                is_open = self._exchange()
            if _STDIN in ready:
                self._read_input()
            if self._output.fd in ready:
                self._write_output()
        if self._lost or self._to_socket:
            raise NotConnected(f"lost the session before it took all commands{self._lost}")
        if not self._is_input_open and (unanswered := self._tally.unanswered):
            commands = "1 command" if unanswered == 1 else f"{unanswered} commands"
            raise NotConnected(f"lost the session before it answered {commands}")
        return self._is_input_open

    def _wait(self, is_open: bool) -> set[int]:
        poll = select.poll()
        events = (0 if self._to_output else select.POLLIN) | (select.POLLOUT if self._to_socket else 0)
        if is_open and events:
            poll.register(self._socket, events)
        if is_open and self._is_input_open and not self._to_socket:
            poll.register(_STDIN, select.POLLIN)
        if self._to_output:
            poll.register(self._output.fd, select.POLLOUT)
        return {fd for fd, _ in poll.poll()}

    def _exchange(self) -> bool:
        """Send and receive without blocking. Returns False at the end of the stream."""
        try:
            if self._to_socket:
                self._to_socket = self._to_socket[self._socket.send(self._to_socket) :]
                self._shut_down_after_last()
        except BlockingIOError:
            pass
        except OSError as error:
            # The socket may still have earlier replies to read.
            self._lost = f": {error.strerror}"
            self._to_socket = b""
            self._is_input_open = False
        if self._to_output:
            return True
        try:
            self._to_output = self._socket.recv(_RECEIVE_SIZE)
        except BlockingIOError:
            return True
        except OSError as error:
            self._lost = f": {error.strerror}"
        self._tally.receive(self._to_output)
        return bool(self._to_output)

    def _read_input(self) -> None:
        data = os.read(_STDIN, _RECEIVE_SIZE)
        self._to_socket += data
        self._tally.send(data)
        if not data:
            self._is_input_open = False
            self._shut_down_after_last()

    def _shut_down_after_last(self) -> None:
        if not self._is_input_open and not self._to_socket and not self._lost:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_WR)

    def _write_output(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._to_output = self._to_output[self._output.write(self._to_output) :]
