# SPDX-License-Identifier: LGPL-2.1-or-later
"""Turns a message into a command for QEMU, or into the error with which QEMU would reply.

The checks and their messages are those of QEMU's dispatcher (qapi/qmp-dispatch.c). QEMU itself checks the rest of a
command.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import msgspec

from .identifier import echoed
from .message import Doubt, Message
from .qdict_order import by_bucket
from .reader import Malformed
from .replies import failure
from .strings import BadString, value_of

_EXECUTE = "execute"
_EXEC_OOB = "exec-oob"
_ARGUMENTS = "arguments"
_ID = "id"


#: A command without arguments in the form that nearly all programs write, with an id that QEMU echoes unchanged. Most
#: commands of busy clients match, and are then handled in half the time.
USUAL = re.compile(
    rb"""[ \r\n]*+\{[ ]*+"execute":[ ]*+"([a-z0-9_-]++)"
         (?:,[ ]*+"id":[ ]*+("[ !#-\[\]-~]*+"|[1-9][0-9]{0,17}+|0))?[ ]*+\}[ \r\n]*+""",
    re.VERBOSE,
)


class Command(msgspec.Struct, frozen=True, gc=False):
    """A command in the form that is sent to QEMU."""

    #: Compact JSON without an id and without the closing brace.
    body: bytes
    name: bytes = b""
    #: Compact JSON, empty without arguments.
    arguments: bytes = b""
    #: The id of the reply as JSON text, or None.
    id: bytes | None = None
    #: True if the command may overtake earlier commands.
    is_oob: bool = False
    #: True if QEMU may find that the command is not JSON. QEMU's error has no id then.
    is_doubtful: bool = False


class Refusal(msgspec.Struct, frozen=True, gc=False):
    """The error reply to a message that QEMU would refuse without running a command."""

    line: bytes
    #: True if the reply overtakes the replies to earlier commands.
    is_oob: bool = False


def usual(captured: Sequence[bytes | None]) -> Command:
    """Make a command from the name and the id that USUAL has captured."""
    name, id = captured
    assert name is not None
    return Command(b'{"execute":"%b"' % name, name, b"", id)


def read(message: Message | Malformed, *, oob: bool) -> Command | Refusal:
    """Read a client's message. `oob` is true if the client has enabled that capability."""
    if isinstance(message, Malformed):
        return Refusal(failure(message.description))
    members = message.members
    if members is None:
        return Refusal(failure("QMP input must be a JSON object"))
    try:
        id = echoed(bytes(members[_ID])) if _ID in members else None
        return _command(message, members, id, oob)
    except BadString as problem:
        return Refusal(failure(f"JSON parse error, {problem}"))


def _command(message: Message, members: Mapping[str, msgspec.Raw], id: bytes | None, oob: bool) -> Command | Refusal:
    key = _EXECUTE
    if _EXECUTE not in members and oob and _EXEC_OOB in members:
        key = _EXEC_OOB
    name = bytes(members.get(key, b""))
    arguments = bytes(members.get(_ARGUMENTS, b""))
    known = (name != b"") + (arguments != b"") + (id is not None)
    if name[:1] != b'"' or arguments[:1] not in (b"", b"{") or known != len(members):
        return Refusal(failure(_problem(members, oob), id=id), is_oob=key is _EXEC_OOB)
    plain = name[1:-1] if name.isascii() and b"\\" not in name else value_of(name).encode()
    body = b'{"' + key.encode() + b'":' + name
    # An empty object has the same effect as no arguments, and QEMU takes 66 µs to read it.
    if len(arguments) > 2:
        body += b',"arguments":' + arguments
    return Command(body, plain, arguments, id, key is _EXEC_OOB, message.doubt is not Doubt.NONE)


def _problem(members: Mapping[str, msgspec.Raw], oob: bool) -> str:
    """Return the first error in the members of a message."""
    executed = ""
    for key in by_bucket(members):
        first = bytes(members[key])[:1]
        if key == _EXECUTE or (key == _EXEC_OOB and oob):
            if first != b'"':
                return f"QMP input member '{key}' must be a string"
            if executed:
                return f"QMP input member '{key}' clashes with '{executed}'"
            executed = key
        elif key == _ARGUMENTS:
            if first != b"{":
                return "QMP input member 'arguments' must be an object"
        elif key != _ID:
            return f"QMP input member '{key}' is unexpected"
    assert not executed
    return "QMP input lacks member 'execute'"
