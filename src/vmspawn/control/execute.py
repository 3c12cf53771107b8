# SPDX-License-Identifier: LGPL-2.1-or-later
"""Runs commands in the guest for Varlink clients, and passes the command's streams to the client.

Names are in Varlink's case because they are part of the protocol.
"""

import base64
import binascii
import errno
import os
import socket
from collections.abc import AsyncIterator

from asyncvarlink import FileDescriptor
from asyncvarlink.serviceerrors import InvalidParameter

from ..agent.protocol import STDERR, STDIN, STDOUT, TTY, Exited, Failed
from ..inside.commands import Commands, Ended, Execution, Wanted
from ..text import printable
from .progress import Progress, empty_reply


def wanted(
    arguments: list[str],
    *,
    environment: list[str],
    directory: str | None,
    user: str | None,
    stdin: bool,
    rows: int | None,
    columns: int | None,
    encoded: bool,
) -> Wanted:
    """Return the command that a client's parameters describe. Raises InvalidParameter."""
    size = None if rows is None and columns is None else (rows or 0, columns or 0)

    def data(parameter: str, text: str) -> bytes:
        try:
            return base64.b64decode(text, validate=True) if encoded else text.encode()
        except (binascii.Error, ValueError):
            raise InvalidParameter(parameter=parameter) from None

    variables = {}
    for each in environment:
        name, equals, value = data("environment", each).partition(b"=")
        if not (name and equals):
            raise InvalidParameter(parameter="environment")
        variables[name] = value
    return Wanted(
        arguments=[data("arguments", each) for each in arguments],
        environment=variables,
        directory=None if directory is None else data("directory", directory),
        user=None if user is None else data("user", user),
        size=size,
        stdin=stdin,
    )


async def execute(commands: Commands, command: Wanted, timeout: float) -> AsyncIterator[Progress]:
    """Start a command and yield its progress. The client closes the connection after it has read all output."""
    execution = await commands.start(command, timeout=timeout)
    try:
        if not await _could_not_start(execution):
            yield _started(execution)
        yield _ended(execution.id, await execution.ended(), command)
        await commands.ended()
    finally:
        execution.close()


async def _could_not_start(execution: Execution) -> bool:
    return await execution.started() is None


def _started(execution: Execution) -> Progress:
    streams = execution.streams
    return {
        **empty_reply("started", execution.id),
        "stdin": _descriptor(streams.get(STDIN)),
        "stdout": _descriptor(streams.get(STDOUT)),
        "stderr": _descriptor(streams.get(STDERR)),
        "terminal": _descriptor(streams.get(TTY)),
    }


def _descriptor(stream: socket.socket | None) -> FileDescriptor | None:
    """Pass a stream to the client without keeping a copy: the guest sees end of file when the last copy is closed."""
    return None if stream is None else FileDescriptor(stream.detach(), should_close=True)


def _ended(id: str, end: Ended, command: Wanted) -> Progress:
    if isinstance(end, Failed):
        return {**empty_reply("failed", id), "status": end.status, "message": failure(end, command)}
    totals: Progress = {**empty_reply("exited", id), "stdoutBytes": end.stdout, "stderrBytes": end.stderr}
    if isinstance(end, Exited):
        return {**totals, "status": end.status}
    return {**totals, "state": "killed", "signal": end.signal}


def failure(end: Failed, command: Wanted) -> str:
    """Return the reason why a command could not be started, with the name of the program, directory or user."""
    names = {"exec": next(iter(command.arguments), None), "chdir": command.directory, "user": command.user}
    name = names.get(end.what)
    if name is None:
        return f"{end.what}: {os.strerror(end.errno)}"
    text = printable(os.fsdecode(name))
    if end.what == "user" and end.errno == errno.ENOENT:
        return f"the guest has no user {text}"
    return f"{text}: {os.strerror(end.errno)}"
