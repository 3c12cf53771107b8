# SPDX-License-Identifier: LGPL-2.1-or-later
"""Reads the lines that QEMU writes to a monitor, and replaces their ids.

QEMU escapes line breaks in strings, so a message is one line, or several on a monitor with `pretty=on`. It is ASCII and
ends with CR LF. The id is at the end of a success and at the start of an error: `{"return": …, "id": 1}`,
`{"id": 1, "error": {"class": …, "desc": …}}`. The id is replaced without decoding the message, unless the message has
another form, as with `pretty=on`.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec

from .strings import quote

GENERIC_ERROR = "GenericError"
COMMAND_NOT_FOUND = "CommandNotFound"

#: QEMU's reply to a command that returns nothing.
EMPTY = b'{"return": {}}\r\n'

_END = b"}\r\n"
_SUCCESS = b'{"return": '
_EVENT = b'{"timestamp": '
_FAILURE = re.compile(rb'\{(?:"id": ([0-9]++), )?"error": ')
_ID_AT_END = re.compile(rb', "id": ([0-9]++)\}\r\n')
#: The number of bytes at a line's end that include any id that vmspawn sends.
_TAIL = len(b', "id": }\r\n') + 10


class Reply(msgspec.Struct, frozen=True, gc=False):
    """QEMU's reply to a command."""

    #: The line without its id.
    line: bytes
    is_error: bool
    #: The reply's id, or -1.
    id: int = -1

    def labelled(self, id: bytes | None) -> bytes:
        """Return the line with `id`, a JSON text, or without an id."""
        if id is None:
            return self.line
        if self.is_error:
            return b"".join((b'{"id": ', id, b", ", self.line[1:]))
        return b"".join((memoryview(self.line)[: -len(_END)], b', "id": ', id, _END))


class _Line(msgspec.Struct):
    """A decoded line."""

    result: msgspec.Raw | msgspec.UnsetType = msgspec.field(default=msgspec.UNSET, name="return")
    error: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    id: int | msgspec.UnsetType = msgspec.UNSET


class Failure(msgspec.Struct):
    """The class and the description of an error."""

    error_class: str = msgspec.field(name="class")
    description: str = msgspec.field(name="desc")


class _FailureLine(msgspec.Struct):
    error: Failure


_LINE = msgspec.json.Decoder(_Line)
_FAILURE_LINE = msgspec.json.Decoder(_FailureLine)


def read(line: bytes) -> Reply | None:
    """Read a line; returns None if it is an event."""
    if line.startswith(_SUCCESS):
        tail = _ID_AT_END.search(line, max(0, len(line) - _TAIL))
        if tail is None:
            return Reply(line, False)
        return Reply(line[: tail.start()] + _END, False, int(tail[1]))
    if line.startswith(_EVENT):
        return None
    head = _FAILURE.match(line)
    if head is None:
        return _decoded(line)
    if head[1] is None:
        return Reply(line, True)
    return Reply(b"{" + line[head.end(1) + 2 :], True, int(head[1]))


def _decoded(line: bytes) -> Reply | None:
    parts = _LINE.decode(line)
    id = -1 if parts.id is msgspec.UNSET else parts.id
    if parts.result is not msgspec.UNSET:
        return Reply(_SUCCESS + bytes(parts.result) + _END, False, id)
    if parts.error is not msgspec.UNSET:
        return Reply(b'{"error": ' + bytes(parts.error) + _END, True, id)
    return None


def failure_of(reply: Reply) -> Failure:
    """Return the error of a failed command's reply."""
    return _FAILURE_LINE.decode(reply.line).error


def returned(reply: Reply) -> Any:
    """Return the result of a command, or None if it failed."""
    return msgspec.json.decode(reply.line).get("return")


def failure(description: str, *, error_class: str = GENERIC_ERROR, id: bytes | None = None) -> bytes:
    """Return an error reply as QEMU writes it. `id` is JSON text."""
    line = b'{"error": {"class": ' + quote(error_class) + b', "desc": ' + quote(description) + b"}}\r\n"
    return Reply(line, True).labelled(id)


def success(id: bytes | None) -> bytes:
    """Return the reply to a command that returns nothing, as QEMU writes it. `id` is JSON text."""
    return Reply(EMPTY, False).labelled(id)
