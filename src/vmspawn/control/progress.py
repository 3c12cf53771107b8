# SPDX-License-Identifier: LGPL-2.1-or-later
"""What `io.vmspawn.Machine.Execute` replies. Varlink's names are part of the protocol, hence their case here."""

import typing

from asyncvarlink import FileDescriptor

# asyncvarlink reads annotations as types, so they cannot be names in strings here.


class Progress(typing.TypedDict):
    """What became of a command: `state` is started, exited, killed or failed.

    `started` comes with the streams. The others come last, with the bytes that were written to the streams in all: the
    client reads these and closes the connection, which removes the streams.
    """

    state: str
    id: str
    stdin: FileDescriptor | None
    stdout: FileDescriptor | None
    stderr: FileDescriptor | None
    terminal: FileDescriptor | None
    status: int | None
    signal: int | None
    stdoutBytes: int | None
    stderrBytes: int | None
    message: str | None


def nothing(state: str, id: str) -> Progress:
    """A reply with nothing but the state."""
    return {
        "state": state,
        "id": id,
        "stdin": None,
        "stdout": None,
        "stderr": None,
        "terminal": None,
        "status": None,
        "signal": None,
        "stdoutBytes": None,
        "stderrBytes": None,
        "message": None,
    }
