# SPDX-License-Identifier: LGPL-2.1-or-later
"""Calls Varlink services: machines' control sockets, and services of the host such as systemd-machined.

`Client` makes blocking calls, for vmctl and for the start of a machine; `call` is for the manager's event loop.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Self

from ..aio.sockets import connect, is_readable, peer_process
from ..errors import NotConnected, ProtocolError, Template, Timeout, UsageError, VmspawnError
from . import runtime

#: Seconds within which a service of the host must reply. It may have to start first, or to wait for systemd.
SERVICE_TIMEOUT = 30.0

#: The maximum size of a reply in bytes. No service of systemd sends more, but any program may listen on a socket.
_REPLY_MAX = 16 << 20

_RECEIVE_SIZE = 65536
_DESCRIPTORS_MAX = 8


class VarlinkError(VmspawnError):
    """A service answered with an error. `name` is its Varlink name."""

    def __init__(self, name: str, parameters: dict[str, Any]) -> None:
        super().__init__(parameters.get("message") or _describe(name, parameters), hint=parameters.get("hint") or "")
        self.name = name
        self.parameters = parameters
        if template := parameters.get("template"):
            self.template = Template(template["message"], template["hint"], template["values"])

    @property
    def leaf(self) -> str:
        """The error's name without its interface."""
        return self.name.rpartition(".")[2]


def _describe(name: str, parameters: dict[str, Any]) -> str:
    interface, _, leaf = name.rpartition(".")
    if interface == "io.systemd" and isinstance(number := parameters.get("errno"), int):
        return os.strerror(number)
    detail = ", ".join(f"{key} {value}" for key, value in parameters.items())
    return f"{leaf} ({detail})" if detail else leaf


class Client:
    """A blocking connection to a service. Use it in `with`, or close it.

    Owns the socket, and the descriptors that were not taken. `service` is the service's name in errors. All
    calls raise VarlinkError if the service answers with an error, NotConnected if the service has ended, and Timeout if
    it does not answer.
    """

    def __init__(self, connected: socket.socket, service: str, *, timeout: float) -> None:
        self.service = service
        self._socket = connected
        self._socket.settimeout(timeout)
        self._timeout = timeout
        self._buffer = bytearray()
        #: The descriptors of the last reply that were not taken, by index.
        self._descriptors: dict[int, int] = {}
        #: The descriptors of later replies. The number is the position in the buffer at which their data ends.
        self._received: list[tuple[int, list[int]]] = []
        self._method = ""

    @classmethod
    def of_service(cls, path: str, *, timeout: float = SERVICE_TIMEOUT) -> Client:
        """Connect to a service of the host. Raises NotConnected if it does not run, or Timeout."""
        try:
            connected = connect(path, timeout=timeout)
        except TimeoutError as error:
            raise Timeout(f"{path} {error.strerror}") from None
        except OSError as error:
            raise NotConnected(f"nothing listens on {path}: {error.strerror}") from None
        return Client(connected, path, timeout=timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def connection(self) -> socket.socket:
        """The socket. The client keeps it."""
        return self._socket

    def close(self) -> None:
        """Close the connection and the descriptors that were not taken."""
        self._socket.close()
        self._close_descriptors()
        for _, descriptors in self._received:
            _close_all(descriptors)
        self._received = []

    def _close_descriptors(self) -> None:
        _close_all(self._descriptors.values())
        self._descriptors = {}

    def call(self, method: str, parameters: dict[str, Any] | None = None, *, fds: Sequence[int] = ()) -> dict[str, Any]:
        """Call a method and return its reply's parameters. The caller keeps `fds`, which are passed to the service."""
        self._send({"method": method, "parameters": parameters or {}}, fds)
        return self._receive(method)[0]

    def begin(self, method: str, parameters: dict[str, Any] | None = None) -> None:
        """Call a method; `finish` waits for the reply."""
        self._send({"method": method, "parameters": parameters or {}})

    def is_answered(self, *, within: float) -> bool:
        """Wait up to `within` seconds for a reply; returns whether there is one."""
        return bool(self._buffer) or is_readable(self._socket.fileno(), within=within)

    def finish(self, method: str) -> dict[str, Any]:
        """Return the reply to the call of `begin`."""
        return self._receive(method)[0]

    def stream(
        self, method: str, parameters: dict[str, Any] | None = None, *, forever: bool = True
    ) -> Iterator[dict[str, Any]]:
        """Call a method that replies many times. With `forever`, the timeout applies to the first reply only."""
        self._send({"method": method, "parameters": parameters or {}, "more": True})
        continues = True
        while continues:
            reply, continues = self._receive(method)
            if forever:
                self._socket.settimeout(None)
            yield reply

    def subscribe(self, method: str, parameters: dict[str, Any] | None = None) -> None:
        """Call a method that replies many times; `next_reply` returns the replies."""
        self._send({"method": method, "parameters": parameters or {}, "more": True})
        self._method = method

    def first_reply(self) -> dict[str, Any]:
        """Return the first reply to `subscribe`. Waits as long as for the reply to `call`."""
        return self._receive(self._method)[0]

    def next_reply(self, seconds: float) -> dict[str, Any] | None:
        """Return the next reply to `subscribe`, or None if none comes within `seconds`."""
        self._socket.settimeout(seconds)
        try:
            return self._receive(self._method)[0]
        except Timeout:
            return None

    def upgrade(self, method: str, parameters: dict[str, Any] | None = None) -> tuple[socket.socket, bytes]:
        """Call a method after which the connection uses another protocol.

        Returns the socket, which the client keeps, and the bytes that came after the reply.
        """
        self._send({"method": method, "parameters": parameters or {}, "upgrade": True})
        self._receive(method)
        received, self._buffer = bytes(self._buffer), bytearray()
        return self._socket, received

    def take_descriptor(self, index: object) -> int:
        """Return the descriptor to which the last reply refers by `index`. The caller owns it.

        Descriptors that are not taken before the next reply are closed. Raises ProtocolError.
        """
        if not isinstance(index, int) or isinstance(index, bool):
            raise ProtocolError(f"{self.service} answered without the index of a descriptor")
        if index not in self._descriptors:
            raise ProtocolError(f"{self.service} refers to descriptor {index}, but has not sent it")
        return self._descriptors.pop(index)

    def _send(self, message: dict[str, Any], fds: Sequence[int] = ()) -> None:
        data = encode(message)
        try:
            sent = socket.send_fds(self._socket, [data], fds) if fds else self._socket.send(data)
            # An empty sendall() makes a system call, which fails if the service has answered and disconnected.
            if sent < len(data):
                self._socket.sendall(data[sent:])
        except TimeoutError:
            raise Timeout(f"{self.service} takes no calls") from None
        except OSError as error:
            raise self._lost(error) from None

    def _receive(self, method: str) -> tuple[dict[str, Any], bool]:
        while b"\0" not in self._buffer:
            self._receive_some(method)
        message, _, self._buffer = self._buffer.partition(b"\0")
        self._accept_descriptors(len(message) + 1)
        return _decode(message, self.service, method)

    def _accept_descriptors(self, size: int) -> None:
        """Replace the descriptors by those of the next reply, which was the first `size` bytes of the buffer.

        The kernel never joins a message that has descriptors with the following message. So the descriptors belong to
        the reply that contains the last byte that was received with them.
        """
        self._close_descriptors()
        found = [fd for end, descriptors in self._received if end <= size for fd in descriptors]
        self._received = [(end - size, descriptors) for end, descriptors in self._received if end > size]
        self._descriptors = dict(enumerate(found))

    def _receive_some(self, method: str) -> None:
        try:
            data, descriptors, _, _ = socket.recv_fds(
                self._socket, _RECEIVE_SIZE, _DESCRIPTORS_MAX, socket.MSG_CMSG_CLOEXEC
            )
        except TimeoutError:
            raise self._late(method) from None
        except OSError as error:
            raise self._lost(error) from None
        self._buffer += data
        if descriptors:
            self._received.append((len(self._buffer), descriptors))
        if not data:
            raise NotConnected(f"{self.service} closed the connection")
        if len(self._buffer) > _REPLY_MAX:
            raise ProtocolError(f"{self.service} answered {method} with more than {_REPLY_MAX >> 20} MiB")

    def _late(self, method: str) -> Timeout:
        pid, _ = peer_process(self._socket)
        trouble = runtime.process_trouble(pid)
        return Timeout(
            f"{self.service} did not answer {method} within {self._timeout:g} s",
            hint=f"process {pid}, which serves it, {trouble}" if trouble else "",
        )

    def _lost(self, error: OSError) -> NotConnected:
        return NotConnected(f"lost the connection to {self.service}: {error.strerror}")


async def call(
    path: str, method: str, parameters: dict[str, Any], *, timeout: float = SERVICE_TIMEOUT
) -> dict[str, Any]:
    """Call one method of the service at `path`. Raises VarlinkError, NotConnected or Timeout."""
    import asyncio

    message = encode({"method": method, "parameters": parameters})
    try:
        async with asyncio.timeout(timeout):
            reply = await _exchange(path, message)
    except TimeoutError:
        raise Timeout(f"{path} did not answer {method} within {timeout:g} s") from None
    except OSError as error:
        raise NotConnected(f"nothing listens on {path}: {error.strerror}") from None
    return _decode(reply.rstrip(b"\0"), path, method)[0]


async def _exchange(path: str, message: bytes) -> bytearray:
    """Send a message to the service at `path`, and return its reply. Raises NotConnected, OSError."""
    import asyncio

    loop = asyncio.get_running_loop()
    reply = bytearray()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.setblocking(False)
        await loop.sock_connect(connection, path)
        await loop.sock_sendall(connection, message)
        while not reply.endswith(b"\0") and len(reply) <= _REPLY_MAX:
            data = await loop.sock_recv(connection, _RECEIVE_SIZE)
            if not data:
                raise NotConnected(f"{path} closed the connection")
            reply += data
    return reply


def encode(message: Mapping[str, object]) -> bytes:
    """Return a call as it is sent. Raises UsageError for text that is not UTF-8."""
    import json

    try:
        return json.dumps(message, separators=(",", ":"), ensure_ascii=False).encode() + b"\0"
    except UnicodeEncodeError:
        raise UsageError("a name or path is not valid UTF-8") from None


def _decode(message: bytes | bytearray, path: str, method: str) -> tuple[dict[str, Any], bool]:
    """Return a reply's parameters, and whether more replies follow."""
    import json

    try:
        reply = json.loads(message)
        parameters, name = reply.get("parameters") or {}, reply.get("error")
        if not isinstance(parameters, dict):
            raise TypeError("the parameters are not an object")
        error = VarlinkError(name, parameters) if name else None
    except (ValueError, TypeError, AttributeError, LookupError, OverflowError, RecursionError):
        raise ProtocolError(f"{path} answered {method} with a message that is not Varlink") from None
    if error is not None:
        raise error
    return parameters, bool(reply.get("continues"))


def _close_all(descriptors: Iterable[int]) -> None:
    for each in descriptors:
        os.close(each)
