# SPDX-License-Identifier: LGPL-2.1-or-later
"""Implements commands in the guest: `machine.run` waits for the end, `machine.execute` returns the streams."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Generic, Protocol, Self, TypeVar

from ..agent.protocol import STDERR, STDIN, TTY
from ..aio.waiting import first_of
from ..errors import CommandFailed, NotConnected, Timeout, UsageError
from ..inside.terminal_input import end_of_input

_AnyText = TypeVar("_AnyText", str, bytes)

#: Seconds without a byte after which the rest of an ended command's output counts as lost.
_OUTPUT_TIMEOUT = 10.0

#: asyncio's limit for a stream, in bytes. While twice as much output is unread, the command in the guest has to wait.
_BUFFER_SIZE = 1 << 20

#: Characters at each end of long output that a repr shows.
_SHOWN = 100


@dataclass(frozen=True, slots=True)
class Completed(Generic[_AnyText]):
    """A command that has ended.

        done = await machine.run("ls /dev")
        print(done.status, done.stdout.splitlines())

    `status` is as in a shell: 128 + N if signal N ended the command, 126 or 127 if it could not be started.
    """

    status: int
    stdout: _AnyText
    stderr: _AnyText

    def __repr__(self) -> str:
        return f"Completed(status={self.status}, stdout={_shortened(self.stdout)}, stderr={_shortened(self.stderr)})"


def _shortened(output: str | bytes) -> str:
    """Return output for a repr, shortened to its beginning and its end."""
    if len(output) <= 2 * _SHOWN:
        return repr(output)
    return f"{output[:_SHOWN]!r}…{output[-_SHOWN:]!r}"


@dataclass(frozen=True, slots=True)
class End:
    """The end of a command, and the number of bytes that it has written to each stream."""

    status: int
    stdout: int
    stderr: int


class Remote(Protocol):
    """A started command, in a machine of this process or of another."""

    #: The sockets of the streams by name. The caller owns them.
    streams: dict[str, socket.socket]

    async def ended(self) -> End:
        """Wait for the command's end. Raises NotConnected."""

    async def resize(self, rows: int, columns: int) -> None:
        """Set the size of the command's terminal."""

    async def signal(self, number: int) -> None:
        """Send a signal to the command's process group."""

    async def close(self) -> None:
        """Remove the command's streams, which kills it if it still runs."""


def shell_or(command: str | Sequence[str | bytes]) -> Sequence[str | bytes]:
    """Return the arguments of a command. A string becomes a command line for the guest's shell."""
    return ("sh", "-c", command) if isinstance(command, str) else command


def arguments_of(command: Sequence[str | bytes], *, terminal: bool) -> list[bytes]:
    """Return a command's arguments as bytes. Raises UsageError if there are neither arguments nor a terminal."""
    if isinstance(command, str | bytes):
        raise TypeError("execute() takes a sequence of arguments; run() takes a command line")
    if not command and not terminal:
        raise UsageError("the command is empty", hint="pass a program, or size= to open the login shell")
    return [os.fsencode(each) for each in command]


def environment_of(environment: Mapping[str, str] | None) -> dict[bytes, bytes]:
    """Return a command's environment variables as bytes."""
    return {os.fsencode(name): os.fsencode(value) for name, value in (environment or {}).items()}


class _Output(asyncio.StreamReaderProtocol):
    """A stream from the guest, which ends when all bytes that the command has written have arrived."""

    def __init__(self) -> None:
        self.reader = asyncio.StreamReader(limit=_BUFFER_SIZE)
        super().__init__(self.reader)
        self.total = 0
        self._expected: int | None = None
        self.is_done = asyncio.Event()

    def data_received(self, data: bytes) -> None:
        if not self.is_done.is_set():
            self.total += len(data)
            super().data_received(data)
            self._check()

    def expect(self, count: int) -> None:
        """Set the total number of bytes to expect."""
        self._expected = count
        self._check()

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)
        self.is_done.set()

    def _check(self) -> None:
        if self._expected is not None and self.total >= self._expected and not self.is_done.is_set():
            self.is_done.set()
            self.reader.feed_eof()


class _TerminalWriter(asyncio.StreamWriter):
    """Types on a terminal, which has one stream for both directions."""

    _last = b""

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Type the bytes."""
        self._last = bytes(data)[-1:] or self._last
        super().write(data)

    def writelines(self, data: Iterable[bytes | bytearray | memoryview]) -> None:
        """Type the bytes of all parts."""
        self.write(b"".join(data))

    def write_eof(self) -> None:
        """Type the end of the input. The stream stays open for the output."""
        self.write(end_of_input(self._last))


class _Streams:
    """The asyncio streams of a command. Their transports own the sockets."""

    def __init__(self) -> None:
        self.stdin: asyncio.StreamWriter | None = None
        self.stdout: asyncio.StreamReader | None = None
        self.stderr: asyncio.StreamReader | None = None
        #: The outputs, each with its transport, and whether it is standard error.
        self.outputs: list[tuple[_Output, asyncio.Transport, bool]] = []
        self._transports: list[asyncio.WriteTransport] = []

    async def add(self, name: str, connected: socket.socket) -> None:
        """Open the stream with this name."""
        connected.setblocking(False)
        if name == STDIN:
            _, self.stdin = await asyncio.open_unix_connection(sock=connected)
            self._transports.append(self.stdin.transport)
            return
        loop = asyncio.get_running_loop()
        transport, output = await loop.create_unix_connection(_Output, sock=connected)
        self._transports.append(transport)
        self.outputs.append((output, transport, name == STDERR))
        if name == STDERR:
            self.stderr = output.reader
        else:
            self.stdout = output.reader
        if name == TTY:
            self.stdin = _TerminalWriter(transport, output, output.reader, loop)

    def close(self) -> None:
        """Close the streams without waiting until unsent input is written. May be called again."""
        for each in self._transports:
            each.abort()


async def attend(remote: Remote) -> Execution:
    """Open the streams of a command that has started. Owns `remote` and its sockets from the call on."""
    streams = _Streams()
    try:
        for name, connected in remote.streams.items():
            await streams.add(name, connected)
    except BaseException:
        streams.close()
        await remote.close()
        for connected in remote.streams.values():
            connected.close()
        raise
    return Execution(remote, streams)


class Execution:
    """A command in the guest, with streams like asyncio's subprocesses.

        async with await machine.execute(["tail", "-f", "/var/log/messages"]) as command:
            print(await command.stdout.readline())

    Use it in an `async with` statement, whose end ends the command if it still runs. `stdin` is None for a command
    without input. With a terminal, `stdin` and `stdout` are the terminal, `stderr` is None, and `stdin.write_eof`
    types Ctrl-D.
    """

    def __init__(self, remote: Remote, streams: _Streams) -> None:
        self._remote = remote
        self._streams = streams
        self.stdin = streams.stdin
        self.stdout = streams.stdout
        self.stderr = streams.stderr
        #: The exit status, as a shell reports it, after the command has ended.
        self.status: int | None = None
        self._waiting = asyncio.create_task(self._wait())
        self._waiting.add_done_callback(lambda task: task.cancelled() or task.exception())

    def __repr__(self) -> str:
        return f"<Execution, {'running' if self.status is None else f'ended with status {self.status}'}>"

    async def wait(self) -> int:
        """Wait for the command's end, and return its status. Unread output may keep the command from ending.

        Raises NotConnected if the machine ends first, or if a part of the output does not arrive.
        """
        return await asyncio.shield(self._waiting)

    async def _wait(self) -> int:
        try:
            end = await self._remote.ended()
            for output, _, is_stderr in self._streams.outputs:
                output.expect(end.stderr if is_stderr else end.stdout)
            for output, transport, _ in self._streams.outputs:
                await _drain(output, transport)
        finally:
            # Stop waiting for the rest.
            for output, _, _ in self._streams.outputs:
                output.expect(0)
        self.status = end.status
        return end.status

    async def communicate(self, input: bytes | None = None) -> tuple[bytes, bytes]:
        """Send the input and end of file, read all output, and wait for the command's end."""
        results = await asyncio.gather(self._feed(input), _read(self.stdout), _read(self.stderr), self.wait())
        return results[1], results[2]

    async def _feed(self, input: bytes | None) -> None:
        if self.stdin is None:
            return
        try:
            self.stdin.write(input or b"")
            await self.stdin.drain()
            if self.stdin.can_write_eof():
                self.stdin.write_eof()
        except (BrokenPipeError, ConnectionResetError):
            # The command has closed its input.
            pass

    async def resize(self, rows: int, columns: int) -> None:
        """Set the size of the command's terminal. Raises NotConnected if the command has ended."""
        await self._remote.resize(rows, columns)

    async def send_signal(self, number: int) -> None:
        """Send a signal to the command's process group. Raises NotConnected if the command has ended."""
        await self._remote.signal(number)

    async def terminate(self) -> None:
        """Send SIGTERM to the command's process group. Raises NotConnected if the command has ended."""
        await self._remote.signal(signal.SIGTERM)

    async def kill(self) -> None:
        """Kill the command and all its children, and close the streams."""
        await self._remote.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """End the command if it still runs, and close the streams. May be called again."""
        self._waiting.cancel()
        await asyncio.wait({self._waiting})
        self._streams.close()
        await self._remote.close()


async def _drain(output: _Output, transport: asyncio.Transport) -> None:
    """Wait for the rest of the output. Raises NotConnected if the guest stops sending it."""
    while not output.is_done.is_set():
        before = output.total
        await first_of(output.is_done, timeout=_OUTPUT_TIMEOUT)
        # A paused transport waits for the reader, not for the guest.
        if not output.is_done.is_set() and output.total == before and transport.is_reading():
            raise NotConnected("the guest did not send all output of the command")


async def _read(reader: asyncio.StreamReader | None) -> bytes:
    return b"" if reader is None else await reader.read()


async def run_to_end(
    start: Callable[[], Awaitable[Execution]], *, check: bool, input: str | bytes | None, timeout: float | None
) -> Completed[bytes]:
    """Run a command until it ends.

    Raises CommandFailed if it fails and `check` is true. Raises Timeout after `timeout` seconds, and kills the command.
    """
    data = input.encode() if isinstance(input, str) else input
    try:
        async with asyncio.timeout(timeout):
            done = await _completed(start, data)
    except TimeoutError:
        raise Timeout(f"the command did not end within {timeout:g} s and was killed") from None
    if check and done.status:
        raise CommandFailed.of(done.status, done.stdout, done.stderr)
    return done


async def _completed(start: Callable[[], Awaitable[Execution]], data: bytes | None) -> Completed[bytes]:
    try:
        async with await start() as execution:
            stdout, stderr = await execution.communicate(data)
            return Completed(await execution.wait(), stdout, stderr)
    except CommandFailed as error:
        # As in a shell, standard error has the reason why a command could not be started.
        return Completed(error.status, b"", f"{error}\n".encode())
