# SPDX-License-Identifier: LGPL-2.1-or-later
"""Defines the replies of `io.vmspawn.Machine.Execute`.

Names are in Varlink's case because they are part of the protocol.
"""

import typing

from asyncvarlink import FileDescriptor

# asyncvarlink evaluates annotations, so this module cannot use `from __future__ import annotations`.


class Progress(typing.TypedDict):
    """A change of a command's state: `state` is started, exited, killed or failed.

    The reply with `started` has the streams. The last reply has one of the other states, and the total number of bytes
    in each stream. The client reads that many bytes and closes the connection, which removes the streams.
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


def empty_reply(state: str, id: str) -> Progress:
    """Return a reply that has only the state and the id."""
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
