# SPDX-License-Identifier: LGPL-2.1-or-later
"""A small synchronous Varlink client, for commands that live for a moment and must feel instant."""

from __future__ import annotations

import array
import json
import os
import select
import socket
from collections.abc import Iterator, Sequence
from typing import Any

from ..errors import NotConnected, Timeout, UsageError, VmspawnError
from ..host import machined, runtime

#: Seconds for a reply, as sd-varlink's clients have it.
REPLY_TIMEOUT = 45.0

_RECEIVE_SIZE = 65536


class VarlinkError(VmspawnError):
    """The service answered with an error: `name` is its Varlink name, the message is for people."""

    def __init__(self, name: str, parameters: dict[str, Any]) -> None:
        message = parameters.get("message")
        super().__init__(message or _describe(name, parameters), hint=parameters.get("hint") or "")
        self.name = name
        self.parameters = parameters

    @property
    def leaf(self) -> str:
        """The error's name without its interface."""
        return self.name.rpartition(".")[2]


def _describe(name: str, parameters: dict[str, Any]) -> str:
    interface, _, leaf = name.rpartition(".")
    if interface == "io.systemd" and "errno" in parameters:
        return os.strerror(parameters["errno"])
    detail = ", ".join(f"{key} {value}" for key, value in parameters.items())
    return f"{leaf} ({detail})" if detail else leaf


class Client:
    """A connection to a machine's control socket. Close it, or use it in `with`."""

    def __init__(self, machine: str, *, timeout: float = REPLY_TIMEOUT) -> None:
        """Connect to the machine of that name. Raises NotConnected if there is none."""
        self.machine = machine
        self._socket = connect(machine, runtime.CONTROL)
        self._socket.settimeout(timeout)
        self._timeout = timeout
        self._buffer = bytearray()
        self._method = ""

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def connection(self) -> socket.socket:
        """The socket, which stays this client's."""
        return self._socket

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()

    def call(self, method: str, parameters: dict[str, Any] | None = None, *, fds: Sequence[int] = ()) -> dict[str, Any]:
        """Call a method and return its reply's parameters. `fds` are passed along and stay the caller's.

        Raises VarlinkError, Timeout or NotConnected.
        """
        self._send({"method": method, "parameters": parameters or {}}, fds)
        return self._receive(method)[0]

    def begin(self, method: str, parameters: dict[str, Any] | None = None) -> None:
        """Call a method without waiting for its reply, which `finish` returns."""
        self._send({"method": method, "parameters": parameters or {}}, ())

    def answered(self, *, within: float) -> bool:
        """Whether a reply is there, or comes within so many seconds."""
        return bool(self._buffer) or bool(select.select([self._socket], [], [], within)[0])

    def finish(self, method: str) -> dict[str, Any]:
        """The reply to what `begin` called. Raises what `call` raises."""
        return self._receive(method)[0]

    def stream(self, method: str, parameters: dict[str, Any] | None = None) -> Iterator[dict[str, Any]]:
        """Call a method that replies many times; waits for the replies without a limit."""
        self._send({"method": method, "parameters": parameters or {}, "more": True}, ())
        self._socket.settimeout(None)
        continues = True
        while continues:
            reply, continues = self._receive(method)
            yield reply

    def subscribe(self, method: str, parameters: dict[str, Any] | None = None) -> None:
        """Call a method that replies many times; `next_reply` has the replies."""
        self._send({"method": method, "parameters": parameters or {}, "more": True}, ())
        self._method = method

    def next_reply(self, seconds: float) -> dict[str, Any] | None:
        """The next reply to `subscribe`, or None if there is none within so many seconds. Raises what `call` raises."""
        self._socket.settimeout(seconds)
        try:
            return self._receive(self._method)[0]
        except Timeout:
            return None

    def upgrade(self, method: str, parameters: dict[str, Any] | None = None) -> tuple[socket.socket, bytes]:
        """Call a method that turns this connection into another protocol's.

        Returns the socket, which stays this client's, and what came behind the reply. Raises what `call` raises.
        """
        self._send({"method": method, "parameters": parameters or {}, "upgrade": True}, ())
        self._receive(method)
        received, self._buffer = bytes(self._buffer), bytearray()
        return self._socket, received

    def _send(self, message: dict[str, Any], fds: Sequence[int]) -> None:
        try:
            data = json.dumps(message, separators=(",", ":"), ensure_ascii=False).encode() + b"\0"
        except UnicodeEncodeError:
            raise UsageError("the name is not UTF-8") from None
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            sent = self._socket.sendmsg([data], ancillary)
            # sendall() of nothing is a system call too, and fails if the service has answered and gone by then.
            if sent < len(data):
                self._socket.sendall(data[sent:])
        except TimeoutError:
            raise Timeout(f"machine {self.machine} takes no calls") from None
        except OSError as error:
            raise NotConnected(f"lost the connection to machine {self.machine}: {error.strerror}") from None

    def _receive(self, method: str) -> tuple[dict[str, Any], bool]:
        while b"\0" not in self._buffer:
            try:
                data = self._socket.recv(_RECEIVE_SIZE)
            except TimeoutError:
                raise Timeout(f"machine {self.machine} did not answer {method} within {self._timeout:g} s") from None
            except OSError as error:
                raise NotConnected(f"lost the connection to machine {self.machine}: {error.strerror}") from None
            if not data:
                raise NotConnected(f"machine {self.machine} closed the connection")
            self._buffer += data
        message, _, self._buffer = self._buffer.partition(b"\0")
        reply = json.loads(message)
        if name := reply.get("error"):
            raise VarlinkError(name, reply.get("parameters") or {})
        return reply.get("parameters") or {}, bool(reply.get("continues"))


def connect(machine: str, name: str) -> socket.socket:
    """Connect to the socket `name` of a machine; the caller owns it. Raises NotConnected if the machine does not run.

    It is done through the folder's descriptor, so that no path is too long for a socket address.
    """
    runtime.check_name(machine)
    try:
        folder = os.open(os.path.join(runtime.runtime_root(), machine), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        # Others have their sockets elsewhere: systemd-vmspawn, and a vmspawn with another runtime directory.
        if path := machined.machines().get(machine):
            return _connect_to(path if name == runtime.CONTROL else os.path.join(os.path.dirname(path), name), machine)
        raise NotConnected(f"there is no machine named {machine}", hint="see: vmctl list") from None
    except OSError as error:
        raise NotConnected(f"cannot reach machine {machine}: {error.strerror}") from None
    try:
        return _connect_to(f"/proc/self/fd/{folder}/{name}", machine)
    except NotConnected:
        pid = runtime.running_qemu(f"/proc/self/fd/{folder}")
        if not pid or name != runtime.CONTROL:
            raise
        raise NotConnected(
            f"machine {machine} runs without a manager (QEMU is process {pid})",
            hint=f"take it over with: vmctl adopt {machine}",
        ) from None
    finally:
        os.close(folder)


def _connect_to(path: str, machine: str) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.connect(path)
    except (FileNotFoundError, ConnectionRefusedError):
        connection.close()
        raise NotConnected(f"machine {machine} does not run", hint="see: vmctl list") from None
    except OSError as error:
        connection.close()
        raise NotConnected(f"cannot reach machine {machine}: {error.strerror}") from None
    return connection
