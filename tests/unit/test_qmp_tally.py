# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests counting the commands of a QMP stream and their replies, wherever the stream is cut."""

import json

import hypothesis
import pytest
from hypothesis import strategies

from vmspawn.cli.ctl.qmp_tally import Tally

VALUES = strategies.recursive(
    strategies.none() | strategies.booleans() | strategies.integers() | strategies.text(),
    lambda inner: strategies.lists(inner, max_size=3) | strategies.dictionaries(strategies.text(), inner, max_size=3),
    max_leaves=8,
)
OBJECTS = strategies.dictionaries(strategies.text(), VALUES, max_size=4)


def pieces(data: bytes, length: int) -> list[bytes]:
    return [data[start : start + length] for start in range(0, len(data), length)]


@hypothesis.given(strategies.lists(OBJECTS, max_size=5), strategies.integers(1, 40), strategies.booleans())
def test_each_message_is_counted_once(messages: list[dict[str, object]], length: int, ascii_only: bool) -> None:
    tally = Tally()
    stream = " ".join(json.dumps(each, ensure_ascii=ascii_only) for each in messages)
    for piece in pieces(stream.encode(errors="surrogatepass"), length):
        tally.send(piece)
    assert tally.unanswered == len(messages)


@pytest.mark.parametrize("length", [1, 7, 1000])
def test_replies_are_counted_and_nothing_else(length: int) -> None:
    tally = Tally()
    tally.send(b'{\'execute\':\'it\\\'s}\'}{"execute":"b\\\\"} {"execute": "c"} {"execute"')
    lines = (
        b'{"QMP": {"version": {}}}\r\n{"return": {}}\r\n{"timestamp": {"seconds": 1}, "event": "STOP"}\r\n'
        b'{"id": 1, "error": {"class": "GenericError", "desc": "QMP"}}\r\n{"return": {"un'
    )
    assert tally.unanswered == 3
    for piece in pieces(lines, length):
        tally.receive(piece)
    assert tally.unanswered == 1
