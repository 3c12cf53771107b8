# SPDX-License-Identifier: LGPL-2.1-or-later
"""Wraps a running command and its streams in blocking calls."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Self

from . import execution
from .blocking import Blocking, finish

#: pytest omits functions of this module from its tracebacks.
__tracebackhide__ = True


class OutputStream(Blocking[asyncio.StreamReader]):
    """An output of a command in the guest. Iterate over it for its lines."""

    def read(self, size: int = -1) -> bytes:
        """Return up to `size` bytes as soon as any are available. Without a size, return all output up to the end."""
        return self._call(lambda inner: inner.read(size))

    def readline(self) -> bytes:
        """Return the next line with its line end, or b"" at the end."""
        return self._call(lambda inner: inner.readline())

    def __iter__(self) -> Iterator[bytes]:
        return iter(self.readline, b"")


class InputStream(Blocking[asyncio.StreamWriter]):
    """The input of a command in the guest."""

    def write(self, data: bytes) -> None:
        """Write bytes. Returns when most of them are sent. Raises BrokenPipeError or ConnectionResetError."""

        async def write(inner: asyncio.StreamWriter) -> None:
            inner.write(data)
            await inner.drain()

        self._call(write)

    def close(self) -> None:
        """Send end of file."""
        self._read(lambda inner: inner.write_eof() if inner.can_write_eof() else None)


class Execution(Blocking[execution.Execution]):
    """A command in the guest, with its streams.

        with machine.execute(["tail", "-f", "/var/log/messages"]) as command:
            for line in command.stdout:
                print(line)

    Use it in a `with` statement, whose end ends the command if it still runs.
    """

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._is_inherited:
            finish(self._inner.close())

    @property
    def stdin(self) -> InputStream | None:
        """Standard input, or None for a command without input."""
        stream = self._read(lambda inner: inner.stdin)
        return None if stream is None else InputStream(stream)

    @property
    def stdout(self) -> OutputStream | None:
        """Standard output. With a terminal, the output of the terminal."""
        stream = self._read(lambda inner: inner.stdout)
        return None if stream is None else OutputStream(stream)

    @property
    def stderr(self) -> OutputStream | None:
        """Standard error, or None for a command with a terminal."""
        stream = self._read(lambda inner: inner.stderr)
        return None if stream is None else OutputStream(stream)

    @property
    def status(self) -> int | None:
        """The exit status, as a shell reports it, after the command has ended."""
        return self._read(lambda inner: inner.status)

    def wait(self) -> int:
        """Wait for the command's end, and return its status. Unread output may keep the command from ending.

        Raises NotConnected if the machine ends first, or if a part of the output does not arrive.
        """
        return self._call(lambda inner: inner.wait())

    def communicate(self, input: bytes | None = None) -> tuple[bytes, bytes]:
        """Send the input and end of file, read all output, and wait for the command's end."""
        return self._call(lambda inner: inner.communicate(input))

    def resize(self, rows: int, columns: int) -> None:
        """Set the size of the command's terminal. Raises NotConnected if the command has ended."""
        self._call(lambda inner: inner.resize(rows, columns))

    def send_signal(self, number: int) -> None:
        """Send a signal to the command's process group. Raises NotConnected if the command has ended."""
        self._call(lambda inner: inner.send_signal(number))

    def terminate(self) -> None:
        """Send SIGTERM to the command's process group. Raises NotConnected if the command has ended."""
        self._call(lambda inner: inner.terminate())

    def kill(self) -> None:
        """Kill the command and all its children, and close the streams."""
        self._call(lambda inner: inner.kill())

    def close(self) -> None:
        """End the command if it still runs, and close the streams. May be called again."""
        self._call(lambda inner: inner.close())
