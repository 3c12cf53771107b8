# SPDX-License-Identifier: LGPL-2.1-or-later
"""A QMP session in blocking calls: its commands, their arguments as a user types them, and the stream as it is."""

from __future__ import annotations

import json
import os
import select
import socket
from typing import Any

from ...errors import NotConnected, QmpError, Timeout, UsageError

_RECEIVE_SIZE = 65536


def parse_arguments(words: list[str]) -> dict[str, Any]:
    """Arguments for a command: one JSON object, or KEY=VALUE where a value that is JSON counts as such.

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
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise UsageError(f"{word!r} is no argument", hint="write KEY=VALUE, or one JSON object")
        try:
            arguments[key] = json.loads(value)
        except ValueError:
            arguments[key] = value
    return arguments


class Session:
    """A QMP session in blocking calls. The socket stays the caller's."""

    def __init__(self, connected: socket.socket, received: bytes, timeout: float) -> None:
        """Negotiate. Raises what `execute` raises."""
        connected.settimeout(timeout)
        self._socket = connected
        self._buffer = received
        self._timeout = timeout
        self._read()
        self.execute("qmp_capabilities", {})

    def execute(self, command: str, arguments: dict[str, Any]) -> Any:
        """Run a command and return what it returned. Raises QmpError, Timeout or NotConnected."""
        message: dict[str, Any] = {"execute": command, "id": 0}
        if arguments:
            message["arguments"] = arguments
        try:
            self._socket.sendall(json.dumps(message).encode())
        except OSError as error:
            raise NotConnected(f"lost the connection: {error.strerror}") from None
        while True:
            reply = self._read()
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
    """Copy standard input to the socket and the socket to standard output, until that ends.

    Returns whether it did so before standard input.
    """
    connected.settimeout(None)
    _write_all(received)
    reading = [connected.fileno(), 0]
    while connected.fileno() in reading:
        ready, _, _ = select.select(reading, [], [])
        if 0 in ready:
            data = os.read(0, _RECEIVE_SIZE)
            if data:
                connected.sendall(data)
            else:
                reading.remove(0)
                connected.shutdown(socket.SHUT_WR)
        if connected.fileno() in ready:
            data = connected.recv(_RECEIVE_SIZE)
            if not data:
                reading.remove(connected.fileno())
            _write_all(data)
    return 0 in reading


def _write_all(data: bytes) -> None:
    while data:
        data = data[os.write(1, data) :]
