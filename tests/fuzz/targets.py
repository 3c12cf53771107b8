# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is fuzzed: the readers of what strangers send, each beside another way to the same answer.

`./dev fuzz` has atheris call a target with inputs that it makes from what they reach; tests/unit/test_fuzz_targets.py
calls each with a few by itself. A target raises AssertionError, or anything else that its subject should not.
"""

import json
from collections.abc import Callable
from typing import Any

import msgspec
from asyncvarlink import VarlinkErrorReply

from vmspawn.control import connection
from vmspawn.control.server import build_registry
from vmspawn.machine.machine import Machine
from vmspawn.qmp.syntax import envelope
from vmspawn.qmp.syntax.dialect import dialect_of
from vmspawn.qmp.syntax.envelope import USUAL, Command, Refusal
from vmspawn.qmp.syntax.message import Message
from vmspawn.qmp.syntax.reader import Malformed
from vmspawn.qmp.syntax.scanner import Scanner

_DIALECTS = (dialect_of("JSON parse error, expecting value"), dialect_of("1:1: JSON parse error, expecting value"))


def scanner(data: bytes) -> None:
    """However a stream is cut, the same messages are in it, and none is taken for JSON that is not."""
    if not data:
        return
    dialect, stream = _DIALECTS[data[0] & 1], data[1:]
    whole = scan(dialect, [stream])
    cut = data[0] % (len(stream) + 1)
    assert _outcomes(scan(dialect, [stream[:cut], stream[cut:]])) == _outcomes(whole)
    assert _outcomes(scan(dialect, [bytes([byte]) for byte in stream])) == _outcomes(whole)
    for each in whole:
        if isinstance(each, Message):
            msgspec.json.decode(each.text, type=msgspec.Raw)


def scan(dialect: Any, pieces: list[bytes]) -> list[Message | Malformed]:
    """What is found in a stream that comes in these pieces."""
    reader, found = Scanner(dialect), []
    for piece in pieces:
        reader.feed(piece)
        while (message := reader.next()) is not None or reader.busy:
            if message is not None:
                found.append(message)
    return found


def _outcomes(found: list[Message | Malformed]) -> list[object]:
    return [(each.text, each.members) if isinstance(each, Message) else each for each in found]


def envelopes(data: bytes) -> None:
    """A command goes on as JSON with the same content, and a refusal is one line of JSON with the client's id."""
    for message in scan(_DIALECTS[0], [data + b"\n"]):
        for oob in (False, True):
            item = envelope.read(message, oob=oob)
            if isinstance(item, Refusal):
                assert "error" in json.loads(item.line)
                assert item.line.endswith(b"\r\n")
            else:
                _check_command(item, message)
    reader = Scanner(_DIALECTS[0])
    reader.feed(data)
    if (captured := reader.take(USUAL)) is not None:
        quick = envelope.usual(captured)
        slow = envelope.read(scan(_DIALECTS[0], [data + b"\n"])[0], oob=False)
        assert (quick.body, quick.name, quick.id) == (slow.body, slow.name, slow.id)  # type: ignore[union-attr]


def _check_command(command: Command, message: Message | Malformed) -> None:
    assert isinstance(message, Message)
    assert message.members is not None
    assert msgspec.json.decode(command.body + b"}", type=dict[str, msgspec.Raw])
    assert (command.id is None) == ("id" not in message.members)
    name = message.members.get("exec-oob" if command.oob else "execute")
    assert name is not None
    assert msgspec.json.decode(name) == command.name.decode()


def varlink(data: bytes) -> None:
    """A call is looked up and its parameters are converted, or it is refused with an error of Varlink's."""
    try:
        request = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return
    if not isinstance(request, dict):
        return
    descriptors = connection._Descriptors(object(), [])
    try:
        call = connection._parse(request)
        assert (call.method, bool(call.more)) == (request["method"], request.get("more") is True)
        _, signature = _REGISTRY.lookup_method(call)
        connection._convert(signature, call, descriptors)
    except VarlinkErrorReply as error:
        json.dumps(error.tojson())


_REGISTRY = build_registry(Machine(guest="builtin", name="fuzz"))

#: By name, each with inputs to begin with.
TARGETS: dict[str, tuple[Callable[[bytes], None], tuple[bytes, ...]]] = {
    "scanner": (
        scanner,
        (
            b'\x05{"execute":"query-name","id":[1,{"a":null}]} {\'execute\':\'x\'}\n',
            b'\x06{"execute" : "a", "arguments": {"b": -1.5e3, "c": "\\u00e9 \xc3\xa9"}} ] {"a" 1} \xff {"id":0} ',
            b"\x07{'k': ['}', \"]\", '\"']}[] 12 \"s\" 'q'\n",
        ),
    ),
    "envelopes": (
        envelopes,
        (
            b'{"execute":"query-status"}',
            b'{"execute":"stop","arguments":{ },"id":{"a":[]}}',
            b'{"exec-oob":"migrate-pause","id":1}',
            b'{"execute":"x","control":{}}',
        ),
    ),
    "varlink": (
        varlink,
        (
            b'{"method":"org.varlink.service.GetInfo"}',
            b'{"method":"io.systemd.MachineInstance.SubscribeEvents","more":true,"parameters":{"filter":["STOP"]}}',
            b'{"method":"io.vmspawn.Machine.AttachStorage","parameters":{"fileDescriptorIndex":0,"name":"a"}}',
            b'{"method":"io.vmspawn.Machine.DetachStorage","oneway":true,"parameters":{"name":"a","force":false}}',
        ),
    ),
}
