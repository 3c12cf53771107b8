# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests that the scanner of QEMU's JSON dialect finds the same messages however the bytes are split."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz.targets import scan
from vmspawn.qmp import limits
from vmspawn.qmp.syntax.dialect import Dialect, dialect_of
from vmspawn.qmp.syntax.message import Message
from vmspawn.qmp.syntax.reader import Malformed
from vmspawn.qmp.syntax.scanner import Scanner

DIALECTS = (dialect_of("JSON parse error, expecting value"), dialect_of("1:1: JSON parse error, expecting value"))

#: Commands and invalid input, in standard JSON and in QEMU's dialect.
STREAM = (
    b'{"execute":"query-name","id":[1,{"a":null}]} {\'execute\':\'x\', "id": \'it\\\'s\'}\n'
    b'{"execute" : "a", "arguments": {"b": -1.5e3, "c": "\\u00e9 \xc3\xa9"}} ] {"a" 1} \xff {"execute":"b","id":0} '
    b"{'k': ['}', \"]\", '\"']}{1.'id':null}[] 12 \"s\" 'q'\n"
)


def texts(found: list[Message | Malformed]) -> list[object]:
    return [each.members if isinstance(each, Message) else each for each in found]


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_cut_at_any_byte_changes_nothing(dialect: Dialect) -> None:
    whole = texts(scan(dialect, [STREAM]))
    for cut in range(1, len(STREAM)):
        assert texts(scan(dialect, [STREAM[:cut], STREAM[cut:]])) == whole, STREAM[:cut]
    assert texts(scan(dialect, [bytes([byte]) for byte in STREAM])) == whole


@pytest.mark.parametrize("dialect", DIALECTS)
@given(data=st.data())
def test_any_cuts_of_any_stream_change_nothing(dialect: Dialect, data: st.DataObject) -> None:
    alphabet = [
        b"{",
        b"}",
        b"[",
        b"]",
        b",",
        b":",
        b'"',
        b"'",
        b"\\",
        b"1",
        b".",
        b"e",
        b"true",
        b" ",
        b"\xff",
        b"\n",
        b"a",
    ]
    stream = b"".join(data.draw(st.lists(st.sampled_from(alphabet), max_size=40))) + b"\xff"
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=5)))
    pieces = [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True) if a < b]
    assert texts(scan(dialect, pieces)) == texts(scan(dialect, [stream]))


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_member_that_is_given_twice_is_refused(dialect: Dialect) -> None:
    (found,) = scan(dialect, [b'{"execute":"stop","execute":"quit"}'])
    assert isinstance(found, Malformed)
    assert found.description.endswith("JSON parse error, duplicate key")


@pytest.mark.parametrize("dialect", DIALECTS)
def test_brackets_nested_deeper_than_qemu_allows_are_refused(dialect: Dialect) -> None:
    deep = b'{"a":' + b"[" * limits.NESTING
    found = scan(dialect, [deep])
    assert isinstance(found[0], Malformed)
    assert found[0].description.endswith("JSON nesting depth limit exceeded")


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_message_without_end_is_refused_at_the_bound(dialect: Dialect) -> None:
    scanner = Scanner(dialect)
    scanner.feed(b'{"a":"')
    found = []
    for _ in range(limits.COMMAND_SIZE // (1 << 20) + 1):
        scanner.feed(b"x" * (1 << 20))
        if (message := scanner.next()) is not None:
            found.append(message)
    assert [each.description for each in found if isinstance(each, Malformed)] == ["JSON token size limit exceeded"]
    assert scanner.pending < limits.COMMAND_SIZE


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_message_of_the_maximum_size_is_accepted(dialect: Dialect) -> None:
    head, tail = b'{"execute":"a","arguments":{"b":"', b'"}}'
    text = head + b"x" * (limits.COMMAND_SIZE - len(head + tail)) + tail
    (found,) = scan(dialect, [text[at : at + (1 << 20)] for at in range(0, len(text), 1 << 20)])
    assert isinstance(found, Message)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_number_without_end_is_refused_at_the_bound(dialect: Dialect) -> None:
    """The number comes in pieces, and all of its bytes are scanned again each time."""
    beginning = b'{"execute":"a","id":' + b"1" * limits.ATOM_SIZE
    (found,) = scan(dialect, [beginning, b"}"])
    assert isinstance(found, Message)
    (found,) = scan(dialect, [beginning, b"1"])
    assert isinstance(found, Malformed)
    assert found.description.endswith("JSON token size limit exceeded")


@pytest.mark.parametrize("dialect", DIALECTS)
def test_many_tokens_are_inspected_in_several_turns(dialect: Dialect) -> None:
    """Tokens that only QEMU accepts, for example strings in single quotes, are inspected one by one."""
    few, many = (b"{" + b",".join(b"'%d':1" % n for n in range(count)) + b"}" for count in (8, limits.STEPS_PER_TURN))
    scanner = Scanner(dialect)
    scanner.feed(few)
    assert isinstance(scanner.next(), Message)
    scanner.feed(many)
    turns = 0
    while (found := scanner.next()) is None:
        assert scanner.is_busy
        turns += 1
    assert isinstance(found, Message)
    assert turns >= 1
    assert not scanner.is_busy
