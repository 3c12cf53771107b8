# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests that a native monitor and a session of the same QEMU give the same replies to the same bytes.

The exception is infinity, which QEMU writes in a form that is not JSON.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.qemu.qmp_fixtures import NEGOTIATE, NEGOTIATE_OOB, SCALE, Client, Kind, Machine, Server, scaled, shared
from vmspawn.qmp.limits import OOB_QUEUE
from vmspawn.qmp.syntax.dialect import PULL
from vmspawn.qmp.syntax.scanner import Scanner

Shared = tuple[Machine, Server]

#: The negotiation of the two clients that are compared.
MODES = ("before", "in-band", "oob")

COMMANDS: tuple[tuple[str, dict[str, object]], ...] = (
    ("query-status", {}),
    ("query-name", {}),
    ("query-version", {}),
    ("query-status", {"extra": 1}),
    ("nope", {}),
    ("nope", {"nested": {"a": [1, {"b": None}]}}),
    ("", {}),
    ("qmp_capabilities", {}),
    ("human-monitor-command", {"command-line": "info version"}),
    ("human-monitor-command", {"command-line": 'say "é" \\ \n'}),
    ("human-monitor-command", {}),
    ("device-list-properties", {"typename": "nope"}),
    ("device_del", {"id": "nope"}),
    ("qom-get", {"path": "/machine", "property": "type"}),
    ("qom-list", {"path": "/nope"}),
    ("blockdev-del", {"node-name": "#nope"}),
    ("getfd", {"fdname": "none"}),
    ("add-fd", {}),
    ("closefd", {"fdname": "none"}),
    ("migrate-pause", {}),
)

#: Fragments that may come between and inside messages, and are not messages.
FRAGMENTS = (
    b"{", b"}", b"[", b"]", b":", b",", b'"', b"'", b"\\", b"\n", b"\r\n", b" ", b"\t", b"\x00", b"\x01",
    b"\x7f", b"\xff",
    b"\xfe", b"\xef\xbb\xbf", b"\xc0\x80", b"\xc3(", b"\xe9", b"\xf4\x90\x80\x80", b"0", b"-", b"1.", b"1e",
    b"0e5", b"007",
    b"1.5", b"-0", b"tru", b"true", b"null", b"NaN", b"%p", b"@", b"{}", b"[]", b"''", b'"\\q"', b'"\\ud83d"',
    b'"\\u12"',
    b'{"a" 1}', b"{1:2}", b'{"a":1,"a":2}', b"[1 2]", b"[1,]", b'{"a":1,}', b"{[}]", b"[}", b"{]", b'"a"b', b"'\\''",
)  # fmt: skip

TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cn"]), max_size=8)
NUMBERS = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
IDS = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)


@st.composite
def rendered(draw: st.DrawFn, value: object) -> bytes:
    """Return JSON in QEMU's dialect, with white space, both kinds of quotes, and escapes."""
    text = json.dumps(
        value, ensure_ascii=draw(st.booleans()), separators=draw(st.sampled_from([(",", ":"), (", ", " : ")]))
    )
    if "'" not in text and "\\" not in text and draw(st.integers(0, 3)) == 0:
        text = text.replace('"', "'")
    return text.encode()


@st.composite
def messages(draw: st.DrawFn) -> bytes:
    """Return a command, or a similar message."""
    name, arguments = draw(st.sampled_from(COMMANDS))
    members: dict[str, object] = {"execute": name}
    if draw(st.booleans()) or arguments:
        members["arguments"] = arguments
    if draw(st.booleans()):
        members["id"] = draw(IDS)
    if draw(st.integers(0, 3)) == 0:
        key = draw(st.sampled_from(["execute", "exec-oob", "arguments", "id", "extra", "é"]) | TEXT)
        members[key] = draw(IDS | st.just("query-name"))
    if draw(st.integers(0, 7)) == 0:
        members["exec-oob"] = members.pop("execute")
    if draw(st.integers(0, 7)) == 0:
        members.pop(draw(st.sampled_from(sorted(members))))
    return draw(rendered(dict(draw(st.permutations(list(members.items()))))))


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """Return a message with a fragment inserted."""
    message = draw(messages())
    start = draw(st.integers(0, len(message)))
    end = start + draw(st.integers(0, 3))
    return message[:start] + draw(st.sampled_from(FRAGMENTS)) + message[end:]


PIECES = messages() | damaged() | st.sampled_from(FRAGMENTS) | st.binary(max_size=6)
STREAMS = st.lists(PIECES | st.just(b"\n"), min_size=1, max_size=6).map(b"".join)


#: QEMU writes a number that is too large in a form that is not JSON; a session repeats the client's text.
_INFINITY = re.compile(rb"(?<=[ \[-])inf\b")


def _spares_qemu(stream: bytes) -> bool:
    """Return whether QEMU survives a stream with oob. If its queue is full, a byte that ends two messages aborts it."""
    scanner = Scanner(PULL)
    scanner.feed(stream)
    return sum(1 for _ in iter(scanner.next, None)) < OOB_QUEUE - 2 and not scanner.is_busy


def _comparable(line: bytes) -> object:
    """Return a line in the form to compare: its bytes, or its value if it has infinity."""
    if not _INFINITY.search(line) and b"e" not in line.lower():
        return line
    try:
        value = json.loads(_INFINITY.sub(b"1e999", line))
    except (ValueError, RecursionError):
        return line
    return value if "Infinity" in json.dumps(value) else line


class Pair:
    """Two clients, one native and one of a session, that get the same input."""

    _numbers = itertools.count()

    def __init__(self, both: Shared, mode: str) -> None:
        machine, server = both
        self.mode = mode
        self.clients = (machine.native(2), server.open())
        assert self.clients[0].line() == self.clients[1].line()
        if mode != "before":
            for client in self.clients:
                assert client.execute(NEGOTIATE_OOB if mode == "oob" else NEGOTIATE) == {"return": {}}

    def answers(self, stream: bytes) -> tuple[list[bytes], list[bytes]]:
        """Return the replies of both to a stream. A byte that belongs to no message ends the stream."""
        end = f"end {next(self._numbers)}"
        whole = stream + b'\xff\n{"execute":"nope","id":"%b"}\n' % end.encode()
        native, session = (self._answer(client, whole, end) for client in self.clients)
        return native, session

    def _answer(self, client: Client, whole: bytes, end: str) -> list[bytes]:
        client.send(whole)
        lines = client.until(end)
        # Out of band, the order of two replies depends on time.
        return sorted(lines) if self.mode == "oob" else lines

    def close(self) -> None:
        for client in self.clients:
            client.close()


@pytest.fixture(scope="module")
def both(qemu: str, kind: Kind) -> Iterator[Shared]:
    with shared(qemu, kind=kind) as made:
        yield made


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.scaled
def test_a_session_answers_any_stream_as_a_monitor_does(both: Shared, mode: str) -> None:
    pairs: list[Pair] = []

    @given(STREAMS.filter(_spares_qemu) if mode == "oob" else STREAMS)
    # The examples are the same in each usual run, so that a failure is due to a change; a scaled run has others.
    @settings(max_examples=scaled(400), derandomize=SCALE == 1, suppress_health_check=list(HealthCheck))
    def check(stream: bytes) -> None:
        pair = pairs.pop() if pairs else Pair(both, mode)
        try:
            native, session = pair.answers(stream)
            assert [*map(_comparable, session)] == [*map(_comparable, native)]
        except BaseException:
            pair.close()
            raise
        pairs.append(pair)

    try:
        check()
    finally:
        for pair in pairs:
            pair.close()
