# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests turning messages into commands or refusals. The errors are QEMU's (qapi/qmp-dispatch.c, qmp-spec.rst)."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vmspawn.qmp.syntax.dialect import PULL
from vmspawn.qmp.syntax.envelope import USUAL, Command, Refusal, read, usual
from vmspawn.qmp.syntax.message import parse
from vmspawn.qmp.syntax.reader import Malformed
from vmspawn.qmp.syntax.scanner import Scanner


def read_text(text: bytes, *, oob: bool = False) -> Command | Refusal:
    """Read the only message of a text through the scanner, as sessions do."""
    scanner = Scanner(PULL)
    # A number or a keyword is complete only when another byte follows.
    scanner.feed(text + b"\n")
    message = scanner.next()
    assert message is not None
    assert scanner.next() is None
    return read(message, oob=oob)


def command(text: bytes, *, oob: bool = False) -> Command:
    item = read_text(text, oob=oob)
    assert isinstance(item, Command), item
    return item


def refusal(text: bytes, *, oob: bool = False) -> dict[str, Any]:
    """Return the error that refuses a message."""
    item = read_text(text, oob=oob)
    assert isinstance(item, Refusal), item
    assert item.line.endswith(b"\r\n")
    reply = json.loads(item.line)
    assert isinstance(reply, dict)
    return reply


def error(description: str) -> dict[str, str]:
    return {"class": "GenericError", "desc": description}


# Commands.


def test_a_command_is_parsed() -> None:
    taken = command(b'{ "id" : 7, "arguments" : { "a" : [ 1, "x y" ] }, "execute" : "query-status" }')
    assert taken == Command(
        b'{"execute":"query-status","arguments":{"a":[1,"x y"]}', b"query-status", b'{"a":[1,"x y"]}', b"7"
    )


def test_arguments_without_members_are_not_sent() -> None:
    assert command(b'{"execute":"stop","arguments":{ }}').body == b'{"execute":"stop"'


def test_a_commands_body_is_json_when_closed() -> None:
    body = command(b"{'execute': 'x', 'arguments': {'it\\'s': '\"'}, 'id': null}").body
    assert json.loads(body + b"}") == {"execute": "x", "arguments": {"it's": '"'}}


@pytest.mark.parametrize(
    ("text", "id"),
    [
        (b'{"execute":"x"}', None),
        (b'{"execute":"x","id":null}', b"null"),
        (b'{"execute":"x","id":false}', b"false"),
        (b'{"execute":"x","id":0}', b"0"),
        (b'{"execute":"x","id":-12}', b"-12"),
        (b'{"execute":"x","id":""}', b'""'),
        (b'{"execute":"x","id":{"a":[]}}', b'{"a": []}'),
    ],
)
def test_an_id_is_kept_and_none_is_made_up(text: bytes, id: bytes | None) -> None:
    assert command(text).id == id


@pytest.mark.parametrize("written", [b"query\\u002dstatus", b"\\u0071uery-status"])
def test_a_name_is_known_however_it_is_spelt(written: bytes) -> None:
    """Otherwise a read-only session could run a command by another spelling of its name."""
    assert command(b'{"execute":"%b"}' % written).name == b"query-status"


@pytest.mark.parametrize("key", [b"exec\\u0075te", b"\\u0065xecute"])
def test_a_member_is_known_however_it_is_spelt(key: bytes) -> None:
    assert command(b'{"%b":"stop"}' % key).name == b"stop"


def test_only_a_client_with_oob_may_send_out_of_band_commands() -> None:
    text = b'{"exec-oob":"migrate-pause","id":1}'
    assert command(text, oob=True) == Command(b'{"exec-oob":"migrate-pause"', b"migrate-pause", b"", b"1", True)
    assert refusal(text) == {"error": error("QMP input member 'exec-oob' is unexpected"), "id": 1}
    assert not command(b'{"execute":"migrate-pause"}', oob=True).is_oob


@pytest.mark.parametrize(
    ("text", "doubtful"),
    [
        (b'{"execute":"x","arguments":{"a":{"b":1,"c":2}}}', False),
        # Duplicate keys are searched for in small messages, and left to QEMU in large ones.
        (b'{"execute":"x","arguments":{"a":{"b":1,"c":2},"pad":"%b"}}' % (b"x" * 5000), True),
        (b'{"execute":"x","arguments":{"pad":"%b"}}' % (b"x" * 5000), False),
    ],
)
def test_messages_that_qemu_may_refuse_as_json_are_marked(text: bytes, doubtful: bool) -> None:
    assert command(text).is_doubtful is doubtful


# Refusals.


@pytest.mark.parametrize(
    ("text", "description"),
    [
        (b'{"id":7}', "QMP input lacks member 'execute'"),
        (b'{"id":7,"arguments":{}}', "QMP input lacks member 'execute'"),
        (b'{"id":7,"execute":1}', "QMP input member 'execute' must be a string"),
        (b'{"id":7,"execute":null}', "QMP input member 'execute' must be a string"),
        (b'{"id":7,"execute":["stop"]}', "QMP input member 'execute' must be a string"),
        (b'{"id":7,"execute":"stop","arguments":[]}', "QMP input member 'arguments' must be an object"),
        (b'{"id":7,"execute":"stop","arguments":null}', "QMP input member 'arguments' must be an object"),
        (b'{"id":7,"execute":"stop","arguments":""}', "QMP input member 'arguments' must be an object"),
        (b'{"id":7,"execute":"stop","extra":1}', "QMP input member 'extra' is unexpected"),
        (b'{"id":7,"execute":"stop","":1}', "QMP input member '' is unexpected"),
        (b'{"id":7,"execute":"stop","control":{}}', "QMP input member 'control' is unexpected"),
        (b'{"id":7,"execute":"stop","Execute":"stop"}', "QMP input member 'Execute' is unexpected"),
        (b'{"id":7,"exec-oob":"stop"}', "QMP input member 'exec-oob' is unexpected"),
        (b'{"id":7,"execute":"stop","exec-oob":"stop"}', "QMP input member 'exec-oob' is unexpected"),
    ],
)
def test_a_message_of_the_wrong_shape_is_refused_with_its_id(text: bytes, description: str) -> None:
    assert refusal(text) == {"error": error(description), "id": 7}


@pytest.mark.parametrize("text", [b'{"execute":"a","exec-oob":"b","id":1}', b'{"id":1,"exec-oob":"b","execute":"a"}'])
def test_a_command_has_one_name(text: bytes) -> None:
    """QEMU's hash table decides which of the two is reported to clash with the other."""
    found = refusal(text, oob=True)
    assert found["id"] == 1
    assert found["error"]["class"] == "GenericError"
    assert set(found["error"]["desc"].split("'")[1::2]) == {"execute", "exec-oob"}
    assert "clashes with" in found["error"]["desc"]


@pytest.mark.parametrize("text", [b"[]", b'["execute"]', b"12", b'"stop"', b"null", b"true", b"-1.5e3"])
def test_a_command_is_an_object(text: bytes) -> None:
    assert refusal(text) == {"error": error("QMP input must be a JSON object")}


@pytest.mark.parametrize("where", ["execute", "id"])
def test_an_invalid_string_is_a_parse_error_without_id(where: str) -> None:
    members = {"execute": '"x"', "id": "1", where: '"\\ud83d"'}
    text = "{" + ",".join(f'"{key}":{value}' for key, value in members.items()) + "}"
    assert refusal(text.encode()) == {"error": error("JSON parse error, \\ud83d is not a valid Unicode character")}


def test_invalid_json_keeps_the_error_of_the_scanner() -> None:
    item = read(Malformed("JSON parse error, expecting value"), oob=True)
    assert isinstance(item, Refusal)
    assert not item.is_oob
    assert json.loads(item.line) == {"error": error("JSON parse error, expecting value")}


# The fast path.


@pytest.mark.parametrize(
    "text",
    [
        b'{"execute":"query-status"}',
        b'{"execute": "query-status"}\r\n',
        b'{"execute": "query-status", "id": "__qmp#00001"}',
        b'{"execute":"query-status","id":18}',
        b' { "execute": "x-query-irq", "id": 0 }\n',
    ],
)
def test_usual_commands_take_the_fast_path(text: bytes) -> None:
    """qemu.qmp, libvirt and json.dumps write these forms. If they did not match, the last test would test nothing."""
    assert USUAL.fullmatch(text)


@pytest.mark.parametrize(
    "text",
    [
        b'{"execute":"stop","id":007}',
        b'{"execute":"stop","id":-0}',
        b'{"execute":"stop","id":1.0}',
        b'{"execute":"stop","id":99999999999999999999}',
        b'{"execute":"stop","id":"\\u0041"}',
        b'{"execute":"stop","id":"\xc3\xa9"}',
        b'{"execute":"stop","id":"\x7f"}',
        b'{"execute":"stop","id":"a" "b"}',
        b'{"execute":"stop","execute":"quit"}',
        b'{"execute":"stop",}',
        b'{"execute":"stop"}{"execute":"stop"}',
        b'{"exec-oob":"stop"}',
    ],
)
def test_unusual_commands_do_not_take_the_fast_path(text: bytes) -> None:
    assert not USUAL.fullmatch(text)


@st.composite
def nearly_usual(draw: st.DrawFn) -> bytes:
    """Return a usual command, or a usual command with something inserted."""
    text = draw(st.from_regex(USUAL, fullmatch=True))
    place = draw(st.integers(0, len(text)))
    odd = draw(st.sampled_from([b"", b'"', b"\\", b" ", b",", b"0", b"-", b"{", b"}", b"'", b"\xc3\xa9", b"\x7f"]))
    return text[:place] + odd + text[place:]


@given(nearly_usual())
@example(b'{"execute":"x","id":"%"}')
@example(b'{"execute":"x","id":999999999999999999}')
def test_the_fast_path_leads_to_the_same_command(text: bytes) -> None:
    match = USUAL.fullmatch(text)
    if match is None:
        return
    taken = usual(match.groups())
    for oob in (False, True):
        assert read(parse(text), oob=oob) == taken
        assert read_text(text, oob=oob) == taken
