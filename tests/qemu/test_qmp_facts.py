# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests the facts of QMP's specification and QEMU's sources about one client, on a native monitor and on a session.

The sources are docs/interop/qmp-spec.rst, monitor/qmp.c, qapi/qmp-dispatch.c, qobject/json-*.c, tests/qtest/qmp-test.c.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest

from tests.qemu.qmp_fixtures import Client, Machine, Server, Side, shared
from vmspawn.errors import NotConnected

GENERIC = "GenericError"
NOT_FOUND = "CommandNotFound"

NAME = b'{"execute":"query-name","id":"after"}'

#: Since about QEMU 9.2, errors in the JSON text begin with their position.
_PLACE = re.compile(r"^\d+:\d+: ")


def answers(client: Client, stream: bytes) -> list[dict[str, Any]]:
    """Return the replies to a stream of complete messages."""
    client.send(stream + NAME)
    return [json.loads(line) for line in client.until("after")]


def problem(reply: dict[str, Any]) -> tuple[str, str]:
    """Return the class and description of an error, without its position in the stream."""
    assert set(reply["error"]) == {"class", "desc"}
    return reply["error"]["class"], _PLACE.sub("", reply["error"]["desc"])


# Framing and greeting.


def test_the_greeting_has_the_version_and_the_capabilities(side: Side, qemu: str) -> None:
    printed = subprocess.run([qemu, "--version"], check=True, capture_output=True, text=True).stdout
    version = re.search(r"version (\d+)\.(\d+)\.(\d+) \((.*)\)", printed)
    assert version is not None
    major, minor, micro = map(int, version.groups()[:3])
    line = side.greeted().line()
    assert json.loads(line) == {
        "QMP": {
            "version": {"qemu": {"major": major, "minor": minor, "micro": micro}, "package": version[4]},
            "capabilities": ["oob"],
        }
    }


@pytest.mark.parametrize(
    ("sent", "line"),
    [
        (b'{"execute":"query-name"}', b'{"return": {}}\r\n'),
        (b'{"execute":"query-name","id":1}', b'{"return": {}, "id": 1}\r\n'),
        (
            '{"execute":"query-name","id":"\u00e9\U0001f600"}'.encode(),
            b'{"return": {}, "id": "\\u00E9\\uD83D\\uDE00"}\r\n',
        ),
        (
            b'{"execute":"nope","id":1}',
            b'{"id": 1, "error": {"class": "CommandNotFound", "desc": "The command nope has not been found"}}\r\n',
        ),
    ],
)
def test_lines_are_ascii_and_end_with_carriage_return_and_newline(side: Side, sent: bytes, line: bytes) -> None:
    client = side.open()
    client.send(sent)
    assert client.line() == line


def test_messages_end_where_their_brackets_balance(side: Side) -> None:
    client = side.open()
    client.send(
        b'{"execute":"query-name","id":1}{"execute":"query-name","id":2} \r\n\t {"execute":"query-name","id":3}'
    )
    assert [client.message()["id"] for _ in range(3)] == [1, 2, 3]
    for byte in b'{"execute":"query-name","id":{"a":"}"}}':
        client.send(bytes([byte]))
    assert client.message() == {"return": {}, "id": {"a": "}"}}


def test_a_number_ends_with_the_byte_behind_it(side: Side) -> None:
    """Therefore `12`, and later `3`, are one message and not two."""
    client, other = side.open(), side.open()
    client.send(b"12")
    # The reply to `12`, if it were a message, would have come before this one.
    assert "return" in other.run("query-qmp-schema")
    client.send(b"3 ")
    assert [problem(reply) for reply in answers(client, b"")] == [(GENERIC, "QMP input must be a JSON object")]


# Negotiation.

BEFORE = [
    (b'{"execute":"query-status","id":7}', NOT_FOUND, "Expecting capabilities negotiation with 'qmp_capabilities'"),
    (b'{"execute":"nope","id":7}', NOT_FOUND, "Expecting capabilities negotiation with 'qmp_capabilities'"),
    # Errors in the structure of the message take precedence.
    (b'{"id":7}', GENERIC, "QMP input lacks member 'execute'"),
    (b'{"exec-oob":"query-status","id":7}', GENERIC, "QMP input member 'exec-oob' is unexpected"),
    (
        b'{"execute":"qmp_capabilities","id":7,"arguments":{"enable":["nope"]}}',
        GENERIC,
        "does not accept value 'nope'",
    ),
    (b'{"execute":"qmp_capabilities","id":7,"arguments":{"enable":["oob","nope"]}}', GENERIC, "'nope'"),
    (b'{"execute":"qmp_capabilities","id":7,"arguments":{"enable":"oob"}}', GENERIC, "'enable', expected: array"),
    (b'{"execute":"qmp_capabilities","id":7,"arguments":{"disable":[]}}', GENERIC, "Parameter 'disable' is unexpected"),
    (b'{"execute":"qmp_capabilities","id":7,"arguments":[]}', GENERIC, "member 'arguments' must be an object"),
]


@pytest.mark.parametrize(("sent", "error_class", "stable"), BEFORE)
def test_before_the_negotiation_no_other_command_is_accepted(
    side: Side, sent: bytes, error_class: str, stable: str
) -> None:
    """A negotiation that failed has no effect."""
    client = side.greeted()
    client.line()
    for _ in range(2):
        reply = client.execute(sent)
        assert reply["id"] == 7
        assert problem(reply)[0] == error_class
        assert stable in problem(reply)[1]
    assert client.execute(b'{"execute":"qmp_capabilities","id":8}') == {"return": {}, "id": 8}
    assert "return" in client.execute(NAME)


@pytest.mark.parametrize("arguments", [b"", b',"arguments":{}', b',"arguments":{"enable":[]}'])
def test_a_second_negotiation_is_refused(side: Side, arguments: bytes) -> None:
    client = side.greeted()
    client.line()
    negotiate = b'{"execute":"qmp_capabilities"%b}' % arguments
    assert client.execute(negotiate) == {"return": {}}
    assert problem(client.execute(negotiate)) == (
        NOT_FOUND,
        "Capabilities negotiation is already complete, command ignored",
    )
    # Without `oob`, the member is unknown.
    assert problem(client.execute(b'{"exec-oob":"query-yank"}')) == (
        GENERIC,
        "QMP input member 'exec-oob' is unexpected",
    )


def test_events_come_only_after_the_negotiation(side: Side) -> None:
    late, client = side.greeted(), side.open()
    client.send(b'{"execute":"cont"}{"execute":"stop","id":1}')
    assert any(b"STOP" in line for line in client.until(1))
    assert "QMP" in late.message()
    late.send(b'{"execute":"qmp_capabilities"}')
    assert late.message() == {"return": {}}


# The id.

IDS = [
    (b"null", b"null"),
    (b"true", b"true"),
    (b"[ ]", b"[]"),
    (b"{ }", b"{}"),
    (b'[1,{"a":[null]}]', b'[1, {"a": [null]}]'),
    (b'""', b'""'),
    (b"'it\\'s'", b'"it\'s"'),
    (b"'\"'", b'"\\""'),
    (b'"\\/"', b'"/"'),
    (b'"\x7f"', b'"\\u007F"'),
    (b'"a\\u0000b"', b'"a\\u0000b"'),
    (b'"\\t\\b"', b'"\\t\\b"'),
    (b"2.50", b"2.5"),
    (b"1e3", b"1000"),
    (b"-0", b"0"),
    (b"1.0", b"1"),
    (b"0.1", b"0.10000000000000001"),
    (b"18446744073709551615", b"18446744073709551615"),
    (b"18446744073709551616", b"1.8446744073709552e+19"),
    (b"-9223372036854775809", b"-9.2233720368547758e+18"),
]


@pytest.mark.parametrize(("sent", "echoed"), IDS)
def test_the_id_is_echoed_as_qemu_writes_the_value(side: Side, sent: bytes, echoed: bytes) -> None:
    """This includes errors of every kind: in the structure, from the dispatcher, from the command."""
    client = side.open()
    client.send(b'{"execute":"query-name","id":%b}' % sent)
    assert client.line() == b'{"return": {}, "id": %b}\r\n' % echoed
    for members in (b'"execute":1', b'"execute":"nope"', b'"execute":"query-balloon"'):
        client.send(b'{%b,"id":%b}' % (members, sent))
        assert client.line().startswith(b'{"id": %b, "error": {"class": ' % echoed)


def test_the_reply_to_a_message_without_an_id_has_no_id(side: Side) -> None:
    client = side.open()
    for members in (b'"execute":"query-name"', b'"execute":1', b'"execute":"nope"', b'"execute":"query-balloon"'):
        assert "id" not in client.execute(b"{%b}" % members)


@pytest.mark.parametrize(
    ("sent", "stable"),
    [
        (b'{"execute":"query-name","id":"\\ud83d"}', "JSON parse error, \\ud83d is not a valid Unicode character"),
        (b'{"id":1,"execute":"query-name","id":1}', "JSON parse error, duplicate key"),
        (b'{"id":1,"execute":"query-name","execute":"query-status"}', "JSON parse error, duplicate key"),
        (b'{"id":1,"execute":"query-name","arguments":{"a":{"b":1,"b":1}}}', "JSON parse error, duplicate key"),
    ],
)
def test_invalid_json_is_answered_without_an_id(side: Side, sent: bytes, stable: str) -> None:
    (reply,) = answers(side.open(), sent)
    assert "id" not in reply
    assert problem(reply) == (GENERIC, stable)


# Errors in the structure of messages, and of commands.

ERRORS = [
    (b'"arguments":{}', GENERIC, "QMP input lacks member 'execute'"),
    (b'"execute":1', GENERIC, "QMP input member 'execute' must be a string"),
    (b'"execute":"query-name","arguments":1', GENERIC, "QMP input member 'arguments' must be an object"),
    (b'"execute":"query-name","extra":1', GENERIC, "QMP input member 'extra' is unexpected"),
    (b'"execute":"nope"', NOT_FOUND, "The command nope has not been found"),
    (b'"execute":""', NOT_FOUND, "The command  has not been found"),
    (b'"execute":"query-name","arguments":{"x":1}', GENERIC, "Parameter 'x' is unexpected"),
    (b'"execute":"human-monitor-command"', GENERIC, "Parameter 'command-line' is missing"),
    (b'"execute":"device_del","arguments":{"id":"nope"}', "DeviceNotFound", "Device 'nope' not found"),
    (b'"execute":"qom-list","arguments":{"path":"/nope"}', "DeviceNotFound", "Device '/nope' not found"),
    # tests/qtest/qmp-cmd-test.c expects this class.
    (b'"execute":"query-balloon"', "DeviceNotActive", "No balloon device has been activated"),
    (
        b'"execute":"device_add","arguments":{"driver":"virtio-rng-pci","id":"d0","bus":"port1"}',
        GENERIC,
        "Duplicate device ID 'd0'",
    ),
    (
        b'"execute":"device_add","arguments":{"driver":"virtio-rng-pci","id":"d1","bus":"pcie.0"}',
        GENERIC,
        "Bus 'pcie.0' does not support hotplugging",
    ),
]


@pytest.mark.parametrize("id", [b"", b',"id":"an id"'])
@pytest.mark.parametrize(("members", "error_class", "description"), ERRORS)
def test_each_error_has_its_class(side: Side, members: bytes, error_class: str, description: str, id: bytes) -> None:
    reply = side.open().execute(b"{%b%b}" % (members, id))
    assert problem(reply) == (error_class, description)
    assert reply.get("id") == ("an id" if id else None)


@pytest.mark.parametrize("sent", [b"[]", b"1 ", b'"query-name"', b"null ", b'["execute"]'])
def test_a_message_must_be_an_object(side: Side, sent: bytes) -> None:
    assert [problem(each) for each in answers(side.open(), sent)] == [(GENERIC, "QMP input must be a JSON object")]


def test_a_node_that_is_in_use_stays(side: Side) -> None:
    client = side.open()
    assert client.run("blockdev-add", driver="null-co", node_name="a") == {"return": {}}
    assert client.run("blockdev-add", driver="raw", file="a", node_name="b") == {"return": {}}
    error_class, description = problem(client.run("blockdev-del", node_name="a"))
    assert error_class == GENERIC
    assert description.endswith(" a is in use")
    for node in ("b", "a"):
        assert client.run("blockdev-del", node_name=node) == {"return": {}}


def test_exec_oob_excludes_execute_and_needs_a_command_that_supports_it(side: Side) -> None:
    client = side.open(oob=True)
    clash = problem(client.execute(b'{"execute":"query-name","exec-oob":"query-yank"}'))
    assert clash[0] == GENERIC
    assert "clashes with" in clash[1]
    assert problem(client.execute(b'{"exec-oob":"query-name","id":1}')) == (
        GENERIC,
        "The command query-name does not support OOB",
    )
    assert problem(client.execute(b'{"exec-oob":"nope"}')) == (NOT_FOUND, "The command nope has not been found")
    assert client.execute(b'{"exec-oob":"query-yank"}').keys() == {"return"}


# Input that is not JSON, and recovery. The texts differ between versions, except those of the lexer.

MALFORMED = [
    (b"{]", ["JSON parse error, "]),
    (b'{"execute": }', ["JSON parse error, expecting value"]),
    (b"[1,]", ["JSON parse error, expecting value"]),
    (b'{"execute":"query-name",}', ["JSON parse error, "]),
    (b"{1:2}", ["JSON parse error, "]),
    (b'{"a" 1}', ["JSON parse error, "]),
    (b"[1 2]", ["JSON parse error, expected "]),
    (b"]", ["JSON parse error, expecting value"]),
    (b"nope ", ["JSON parse error, invalid keyword 'nope'"]),
    (b"\xff", ["JSON parse error, stray '\ufffd'"]),
    (b"\xff\xff\xff", ["JSON parse error, stray '\ufffd'"] * 3),
    (b"\x01", ["JSON parse error, stray '\x01'"]),
    (b"{\xff", ["JSON parse error, stray '\ufffd'"]),
    (b"{\x01", ["JSON parse error, stray '\x01'"]),
    (b"{'bad \xff", ["JSON parse error, stray ''bad \ufffd'"]),
    (b'{"bad\n', ["JSON parse error, stray '\"bad\n'"]),
    (b'["\xc3("]', ["JSON parse error, invalid UTF-8 sequence in string"]),
    (b'["\\q"]', ["JSON parse error, invalid escape sequence in string"]),
    (b'{"execute":"query-name","id":NaN}', ["JSON parse error, stray 'N'", "JSON parse error, expecting value"]),
    (b'{"execute":"query-name","id":007}', ["JSON parse error, stray '00'", "JSON parse error, expecting value"]),
    (b"%p ", ["JSON parse error, stray '%'"]),
    (b"\xef\xbb\xbf", ["JSON parse error, stray '\ufffd'"]),
]


@pytest.mark.parametrize("oob", [False, True])
@pytest.mark.parametrize(("sent", "stable"), MALFORMED)
def test_malformed_input_is_an_error_in_its_turn_and_the_next_command_runs(
    side: Side, sent: bytes, stable: list[str], oob: bool
) -> None:
    client = side.open(oob=oob)
    first, *errors = answers(client, b'{"execute":"query-name","id":"before"}' + sent)
    assert first == {"return": {}, "id": "before"}
    assert len(errors) == len(stable)
    for reply, text in zip(errors, stable, strict=True):
        assert "id" not in reply
        error_class, description = problem(reply)
        assert error_class == GENERIC
        assert description.startswith(text)


@pytest.mark.parametrize("recovery", [b"\xff", b"\x01"])
@pytest.mark.parametrize("half", [b"{", b'{"execute":"qu', b'{"execute":"query-name","arguments":[[{"a":'])
def test_a_byte_that_json_never_allows_ends_an_incomplete_message(side: Side, half: bytes, recovery: bytes) -> None:
    """QEMU's tests/qtest/qmp-test.c sends this byte, and so does a client that has lost the framing."""
    (reply,) = answers(side.open(), half + recovery)
    assert problem(reply)[0] == GENERIC
    assert "JSON parse error" in problem(reply)[1]


# Limits.


def test_brackets_nest_1024_deep(side: Side) -> None:
    client = side.open()
    # The message itself is the first level.
    client.send(b'{"execute":"query-name","id":%b}' % (b"[" * 1023 + b"]" * 1023))
    assert client.line() == b'{"return": {}, "id": %b}\r\n' % (b"[" * 1023 + b"]" * 1023)
    client.send(b'{"execute":"query-name","id":%b}\xff' % (b"[" * 1024 + b"]" * 1024))
    # An older QEMU then reports errors about the remaining brackets.
    first, *_ = answers(client, b"")
    assert problem(first) == (GENERIC, "JSON nesting depth limit exceeded")


# A QEMU that is not ready.


@contextmanager
def preconfigured(qemu: str) -> Iterator[tuple[Machine, Server]]:
    """Start a QEMU that waits for its configuration.

    About once in some hundreds of such starts, QEMU 7.2 answers nothing after its greeting (docs/qemu.md). One QEMU
    closed its monitors instead. This function then starts another QEMU.
    """
    for attempt in range(3):
        with ExitStack() as stack:
            try:
                both = stack.enter_context(shared(qemu, arguments=["--preconfig"], deadline=20))
            except (TimeoutError, NotConnected):
                if attempt == 2:
                    raise
                continue
            yield both
            return


@pytest.mark.parametrize("who", ["native", "session"])
def test_commands_that_need_the_machine_are_refused_by_qemu(qemu: str, who: str) -> None:
    with preconfigured(qemu) as both, Side(who, *both) as side:
        client = side.open()
        error_class, description = problem(client.run("query-balloon"))
        assert error_class == GENERIC
        assert "query-balloon" in description
        assert "permitted" in description
        assert client.run("x-exit-preconfig") == {"return": {}}
        assert problem(client.run("query-balloon"))[0] == "DeviceNotActive"
