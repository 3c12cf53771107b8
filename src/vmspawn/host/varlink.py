# SPDX-License-Identifier: LGPL-2.1-or-later
"""Calls to the host's own Varlink services, such as systemd-machined: one at a time, each with a deadline.

`Service` blocks, for the commands and the way to QEMU's start; `call` is for the manager's event loop.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from typing import Any

from ..errors import Timeout, VmspawnError

#: Seconds for a reply. A service may have to start first, and to wait for systemd to make a unit.
REPLY_TIMEOUT = 30.0

#: Bytes that one reply may have; no service of systemd's sends more, and what is at a socket may be anybody's.
_REPLY_MAX = 16 << 20

_RECEIVE_SIZE = 65536
_DESCRIPTORS_MAX = 8


class ServiceMissing(VmspawnError):
    """Nothing listens on the service's socket."""


class ServiceError(VmspawnError):
    """The service answered with an error; `name` is its Varlink name."""

    def __init__(self, name: str, parameters: dict[str, Any]) -> None:
        super().__init__(describe(name, parameters))
        self.name = name
        self.parameters = parameters

    @property
    def leaf(self) -> str:
        """The error's name without its interface."""
        return self.name.rpartition(".")[2]


def describe(name: str, parameters: dict[str, Any]) -> str:
    """An error for people."""
    interface, _, leaf = name.rpartition(".")
    if interface == "io.systemd" and isinstance(number := parameters.get("errno"), int):
        return os.strerror(number)
    detail = ", ".join(f"{key} {value}" for key, value in parameters.items())
    return f"{leaf} ({detail})" if detail else leaf


class Service:
    """A connection to a service. Use it in `with`; it owns the socket and the descriptors that nobody took."""

    def __init__(self, path: str, *, timeout: float = REPLY_TIMEOUT) -> None:
        """Connect. Raises ServiceMissing if nothing is there, Timeout if it takes no connection."""
        self.path = path
        self._timeout = timeout
        self._buffer = bytearray()
        #: Descriptors that came with the replies so far, in order.
        self._descriptors: list[int] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(timeout)
        try:
            self._socket.connect(path)
        except TimeoutError:
            self._socket.close()
            raise Timeout(f"{path} took no connection within {timeout:g} s") from None
        except OSError as error:
            self._socket.close()
            raise ServiceMissing(f"nothing listens on {path}: {error.strerror}") from None

    def __enter__(self) -> Service:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection and the descriptors that were not taken."""
        self._socket.close()
        while self._descriptors:
            os.close(self._descriptors.pop())

    def call(self, method: str, parameters: dict[str, Any]) -> dict[str, Any]:
        """Call a method and return its reply's parameters. Raises ServiceError, ServiceMissing or Timeout."""
        self._send({"method": method, "parameters": parameters})
        return self._receive(method)[0]

    def stream(self, method: str, parameters: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Call a method that replies many times; each reply has the whole deadline. Raises what `call` raises."""
        self._send({"method": method, "parameters": parameters, "more": True})
        continues = True
        while continues:
            reply, continues = self._receive(method)
            yield reply

    def take_descriptor(self, index: int) -> int:
        """The descriptor that the last reply calls `index`; the caller owns it. Raises VmspawnError."""
        if not 0 <= index < len(self._descriptors):
            raise VmspawnError(f"{self.path} named descriptor {index} and sent {len(self._descriptors)}")
        return self._descriptors.pop(index)

    def _send(self, message: dict[str, Any]) -> None:
        try:
            self._socket.sendall(_encode(message))
        except TimeoutError:
            raise Timeout(f"{self.path} takes no calls") from None
        except OSError as error:
            raise ServiceMissing(f"lost the connection to {self.path}: {error.strerror}") from None

    def _receive(self, method: str) -> tuple[dict[str, Any], bool]:
        while b"\0" not in self._buffer:
            self._receive_some(method)
        message, _, self._buffer = self._buffer.partition(b"\0")
        return _decode(message, self.path, method)

    def _receive_some(self, method: str) -> None:
        try:
            data, descriptors, _, _ = socket.recv_fds(self._socket, _RECEIVE_SIZE, _DESCRIPTORS_MAX)
        except TimeoutError:
            raise Timeout(f"{self.path} did not answer {method} within {self._timeout:g} s") from None
        except OSError as error:
            raise ServiceMissing(f"lost the connection to {self.path}: {error.strerror}") from None
        for fd in descriptors:
            os.set_inheritable(fd, False)
        self._descriptors += descriptors
        if not data:
            raise ServiceMissing(f"{self.path} closed the connection")
        self._buffer += data
        if len(self._buffer) > _REPLY_MAX:
            raise VmspawnError(f"{self.path} answered {method} with more than {_REPLY_MAX >> 20} MiB")


async def call(path: str, method: str, parameters: dict[str, Any], *, timeout: float = REPLY_TIMEOUT) -> dict[str, Any]:
    """Call one method of the service at `path`. Raises ServiceError, ServiceMissing or Timeout."""
    import asyncio

    loop = asyncio.get_running_loop()
    buffer = bytearray()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.setblocking(False)
        try:
            async with asyncio.timeout(timeout):
                await loop.sock_connect(connection, path)
                await loop.sock_sendall(connection, _encode({"method": method, "parameters": parameters}))
                while not buffer.endswith(b"\0") and len(buffer) <= _REPLY_MAX:
                    data = await loop.sock_recv(connection, _RECEIVE_SIZE)
                    if not data:
                        raise ServiceMissing(f"{path} closed the connection")
                    buffer += data
        except TimeoutError:
            raise Timeout(f"{path} did not answer {method} within {timeout:g} s") from None
        except OSError as error:
            raise ServiceMissing(f"nothing listens on {path}: {error.strerror}") from None
    return _decode(buffer.rstrip(b"\0"), path, method)[0]


def _encode(message: dict[str, Any]) -> bytes:
    import json

    return json.dumps(message, separators=(",", ":")).encode() + b"\0"


def _decode(message: bytes | bytearray, path: str, method: str) -> tuple[dict[str, Any], bool]:
    """A reply's parameters, and whether more follow."""
    import json

    try:
        reply = json.loads(message)
        parameters = reply.get("parameters") or {}
    except (ValueError, AttributeError):
        raise VmspawnError(f"{path} answered {method} with what is not Varlink") from None
    if name := reply.get("error"):
        raise ServiceError(name, parameters)
    return parameters, bool(reply.get("continues"))
