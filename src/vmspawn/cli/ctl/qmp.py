# SPDX-License-Identifier: LGPL-2.1-or-later
"""`vmctl qmp` and `vmctl qmp-share`: a QMP session for one command, for a program's pipe, or for a person."""

from __future__ import annotations

import argparse
import json
import os
import select
import socket
import sys
from typing import Any

from ...control.client import REPLY_TIMEOUT, Client
from ...errors import NotConnected, QmpError, Timeout, UsageError, VmspawnError
from ..disconnect import watching
from ..tables import print_json

_RECEIVE_SIZE = 65536


def add_options(parser: argparse.ArgumentParser) -> None:
    """The arguments of `vmctl qmp`."""
    parser.add_argument("command", metavar="COMMAND", nargs="?", help="a QMP command; without one, a shell")
    parser.add_argument("arguments", metavar="ARGUMENT", nargs="*", help="its arguments: KEY=VALUE, or one JSON object")
    parser.add_argument("--stdio", action="store_true", help="the QMP stream on standard input and output")
    parser.add_argument("--read-only", action="store_true", help="allow only commands that change nothing")


def run(options: argparse.Namespace) -> None:
    """The verb `qmp`. Raises VmspawnError if the command did not succeed."""
    if options.stdio and options.command:
        raise UsageError("--stdio takes no command", hint="leave out one of the two")
    arguments = parse_arguments(options.arguments)
    if not (options.stdio or options.command) and not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise UsageError("no command, and no terminal for a shell", hint="name a command, or use --stdio for a pipe")
    timeout = REPLY_TIMEOUT if options.timeout is None else options.timeout
    with Client(options.machine, timeout=timeout) as client:
        connected, received = client.upgrade("io.vmspawn.Machine.AcquireQMP", {"readOnly": options.read_only})
        with watching(options.machine, connected) as parting:
            try:
                hung_up = _talk(options, connected, received, arguments, timeout)
            except NotConnected:
                parting.check()
                raise
            if hung_up:
                parting.check()
                if not options.stdio:
                    print("The machine ended.")


def _talk(
    options: argparse.Namespace, connected: socket.socket, received: bytes, arguments: dict[str, Any], timeout: float
) -> bool:
    """What the options ask for; whether it was the machine that ended it."""
    if options.stdio:
        return relay(connected, received)
    if not options.command:
        return _shell(connected, received, options.machine)
    mode = options.json if options.json != "off" else "pretty" if sys.stdout.isatty() else "short"
    print_json(Session(connected, received, timeout).execute(options.command, arguments), mode)
    return False


def _shell(connected: socket.socket, received: bytes, machine: str) -> bool:
    try:
        from .qmp_shell import run_shell
    except ModuleNotFoundError as error:
        if error.name != "prompt_toolkit":
            raise
        raise VmspawnError(
            "the QMP shell needs prompt_toolkit, which is not installed",
            hint="install vmspawn[shell], or name a command, or use --stdio",
        ) from None
    return run_shell(connected, received, machine)


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


def share(options: argparse.Namespace) -> None:
    """The verb `qmp-share`. Raises VmspawnError if the socket cannot be shared, or QEMU goes."""
    import asyncio

    from ...control.share import share as serve
    from ...qmp.limits import GREETING_TIMEOUT

    def ready() -> None:
        if not options.quiet:
            print(f"sharing {options.socket} on {options.listen}; Ctrl-C ends it", file=sys.stderr, flush=True)

    timeout = GREETING_TIMEOUT if options.timeout is None else options.timeout
    asyncio.run(serve(options.socket, options.listen, ready=ready, timeout=timeout))
