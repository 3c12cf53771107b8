# SPDX-License-Identifier: LGPL-2.1-or-later
"""Starts commands in the guest, directly or through the control socket of another manager."""

from __future__ import annotations

import base64
import os
import socket
from collections.abc import Mapping
from contextlib import AsyncExitStack
from typing import Any

from ..agent.protocol import STDERR, STDIN, STDOUT, TTY, Exited, Failed
from ..control import calls
from ..errors import CommandFailed
from ..inside.commands import Commands, Wanted
from ..inside.commands import Execution as Command
from ..timeouts import REPLY_GRACE
from .execution import End

_MACHINE = "io.vmspawn.Machine"

#: The names of the streams in the replies of Execute.
_STREAMS = {"stdin": STDIN, "stdout": STDOUT, "stderr": STDERR, "terminal": TTY}


class Local:
    """A command in a machine of this process."""

    def __init__(self, command: Command) -> None:
        self._command = command
        # The end of the command or machine does not close the streams; the caller does. The caller's event loop or
        # thread may still use a descriptor, whose number could belong to another file after a close.
        self.streams = {name: socket.socket(fileno=each.detach()) for name, each in command.streams.items()}

    @classmethod
    async def start(cls, commands: Commands, wanted: Wanted, timeout: float) -> Local:
        """Start a command. Raises CommandFailed if it cannot be started, and the errors of `Commands.start`."""
        command = await commands.start(wanted, timeout=timeout)
        try:
            if await command.started() is None:
                end = await command.ended()
                assert isinstance(end, Failed)
                raise _not_started(end.status, f"{end.what}: {os.strerror(end.errno)}")
        except BaseException:
            command.close()
            raise
        return cls(command)

    async def ended(self) -> End:
        """Wait for the command's end. Raises NotConnected."""
        end = await self._command.ended()
        assert not isinstance(end, Failed)
        status = end.status if isinstance(end, Exited) else 128 + end.signal
        return End(status, end.stdout, end.stderr)

    async def resize(self, rows: int, columns: int) -> None:
        """Set the size of the command's terminal."""
        self._command.resize(rows, columns)

    async def signal(self, number: int) -> None:
        """Send a signal to the command's process group."""
        self._command.signal(number)

    async def close(self) -> None:
        """Remove the command's streams, which kills it if it still runs."""
        self._command.close()


class Connected:
    """A command that another manager has started. The end of the connection ends the command."""

    def __init__(
        self, machine: str, connection: calls.Connection, closing: AsyncExitStack, started: calls.Reply
    ) -> None:
        self._machine = machine
        self._connection = connection
        self._closing = closing
        self._id: str = started.parameters["id"]
        self.streams = {
            name: socket.socket(fileno=started.fds[started.parameters[member]])
            for member, name in _STREAMS.items()
            if started.parameters.get(member) is not None
        }

    @classmethod
    async def start(cls, machine: str, wanted: Wanted, timeout: float) -> Connected:
        """Start a command. Raises CommandFailed if it cannot be started, and the errors of the machine's manager."""
        async with AsyncExitStack() as closing:
            connection = await closing.enter_async_context(calls.opened(machine))
            parameters = _parameters(wanted, timeout)
            await connection.send({"method": f"{_MACHINE}.Execute", "parameters": parameters, "more": True})
            started = await calls.in_time(connection.receive(), machine, "Execute", timeout + REPLY_GRACE)
            if started.parameters["state"] != "started":
                raise _not_started(int(started.parameters["status"]), str(started.parameters["message"]))
            return cls(machine, connection, closing.pop_all(), started)
        raise AssertionError

    async def ended(self) -> End:
        """Wait for the command's end. Raises NotConnected."""
        end: Mapping[str, Any] = (await self._connection.receive()).parameters
        status = 128 + end["signal"] if end["state"] == "killed" else end["status"]
        return End(int(status), int(end["stdoutBytes"]), int(end["stderrBytes"]))

    async def resize(self, rows: int, columns: int) -> None:
        """Set the size of the command's terminal."""
        await calls.call(
            self._machine, f"{_MACHINE}.ResizeTerminal", {"id": self._id, "rows": rows, "columns": columns}
        )

    async def signal(self, number: int) -> None:
        """Send a signal to the command's process group."""
        await calls.call(self._machine, f"{_MACHINE}.SignalCommand", {"id": self._id, "signal": number})

    async def close(self) -> None:
        """Remove the command's streams, which kills it if it still runs."""
        await self._closing.aclose()


def _parameters(wanted: Wanted, timeout: float) -> dict[str, object]:
    def encode(data: bytes) -> str:
        return base64.b64encode(data).decode()

    return {
        "arguments": [encode(each) for each in wanted.arguments],
        "environment": [encode(b"%b=%b" % each) for each in wanted.environment.items()],
        "directory": None if wanted.directory is None else encode(wanted.directory),
        "user": None if wanted.user is None else encode(wanted.user),
        "stdin": wanted.stdin,
        "rows": None if wanted.size is None else wanted.size[0],
        "columns": None if wanted.size is None else wanted.size[1],
        "base64": True,
        "timeoutUSec": int(timeout * 1_000_000),
    }


def _not_started(status: int, message: str) -> CommandFailed:
    return CommandFailed(f"cannot run the command: {message}", status=status)
