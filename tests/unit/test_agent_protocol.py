# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests the encoding of messages to the agent, and the parsing of messages from it, whatever a guest sends."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmspawn.agent import protocol
from vmspawn.agent.protocol import (
    Connected,
    Done,
    Exited,
    Failed,
    Forked,
    InputClosed,
    Lost,
    Malformed,
    Pong,
    Ready,
    Refused,
    Run,
    Signalled,
    Started,
)
from vmspawn.errors import UsageError

TEXT = st.binary(max_size=40).filter(lambda value: b"\0" not in value)


def words(message: bytes) -> list[bytes]:
    """Return the words of a message as the agent reads them."""
    assert message.count(b"\n") == 1
    assert message.endswith(b" ;\n")
    found = []
    for word in message[:-3].split(b" "):
        pieces = word.split(b"%")
        decoded = (
            [pieces[0], *(bytes([int(piece[:2], 16)]) + piece[2:] for piece in pieces[1:])] if word != b"%" else []
        )
        found.append(b"".join(decoded))
    return found


@given(
    arguments=st.lists(TEXT, max_size=8).filter(lambda found: not found or found[0] != b""),
    environment=st.dictionaries(TEXT.filter(lambda name: name != b"" and b"=" not in name), TEXT, max_size=4),
    directory=st.none() | TEXT.filter(bool),
    user=st.none() | TEXT.filter(bool),
    size=st.none() | st.tuples(st.integers(0, 65535), st.integers(0, 65535)),
    stdin=st.booleans(),
)
def test_a_command_arrives_unchanged(
    arguments: list[bytes],
    environment: dict[bytes, bytes],
    directory: bytes | None,
    user: bytes | None,
    size: tuple[int, int] | None,
    stdin: bool,
) -> None:
    command = Run("c1", "s1", "p1", arguments, environment, directory, user, size, stdin)
    head, options = words(protocol.run(command))[:4], words(protocol.run(command))[4:]
    end = options.index(b"--")
    assert head == [b"run", b"c1", b"s1", b"p1"]
    assert options[end + 1 :] == arguments
    found = dict(option.partition(b"=")[::2] for option in options[:end] if not option.startswith(b"env="))
    assert found.get(b"cwd") == directory
    assert found.get(b"user") == user
    assert found.get(b"tty") == (b"%d,%d" % size if size else None)
    assert (b"stdin" in found) == (stdin and size is None)
    variables = [option[4:].partition(b"=")[::2] for option in options[:end] if option.startswith(b"env=")]
    assert dict(variables) == environment


def test_messages_are_lines_of_words() -> None:
    assert protocol.sync("n-1") == b"\nsync n-1 ;\n"
    assert protocol.ping("2") == b"ping 2 ;\n"
    assert protocol.resize("c", 24, 80) == b"resize c 24 80 ;\n"
    assert protocol.signal("c", 15) == b"signal c 15 ;\n"
    assert protocol.hang_up("c") == b"hangup c ;\n"
    assert protocol.fork("0a", 12_000_000_034) == b"fork 0a 12 34 ;\n"
    assert protocol.close("c", "stdin") == b"close c stdin ;\n"
    assert protocol.count_ports("p") == b"ports p ;\n"
    assert protocol.count_connected("p") == b"connected p ;\n"
    assert (
        protocol.run(Run("c", "s", "p", [b"echo", b"", b"a b;%\n"])) == b"run c s p stdin -- echo % a%20b%3b%25%0a ;\n"
    )


def test_a_port_is_named_after_its_set() -> None:
    assert protocol.port_name("p-1", "stdin") == "io.vmspawn.exec.p-1.stdin"
    for stream in protocol.PORTS:
        assert protocol.parse_port_name(protocol.port_name("p-1", stream)) == ("p-1", stream)


@pytest.mark.parametrize(
    "command",
    [
        Run("c", "s", "p", [b"a\0b"]),
        Run("c", "s", "p", [b""]),
        Run("c", "s", "p", [b"a"], {b"A": b"\0"}),
        Run("c", "s", "p", [b"a"], {b"A=B": b""}),
        Run("c", "s", "p", [b"a"], {b"": b""}),
        Run("c", "s", "p", [b"a"], {b"%d" % number: b"" for number in range(1025)}),
        Run("c", "s", "p", [b"a"], user=b""),
        Run("c", "s", "p", [b"a"], directory=b""),
        Run("c", "s", "p", [b"a"], size=(-1, 80)),
        Run("c", "s", "p", [b"a"], size=(24, 65536)),
        Run("c", "s", "p", [b"a" * (128 * 1024)]),
        Run("c", "s", "p", [b"\n" * 120_000] * 2),
        Run("c", "s", "p", [b"a"] * 32768),
    ],
)
def test_commands_that_cannot_be_sent_are_refused(command: Run) -> None:
    with pytest.raises(UsageError):
        protocol.run(command)


def test_an_error_names_the_part_that_is_too_long() -> None:
    for command, name in (
        (Run("c", "s", "p", [b"x" * protocol.ARGUMENT_MAX]), "an argument"),
        (Run("c", "s", "p", environment={b"A": b"x" * protocol.ARGUMENT_MAX}), "an environment variable"),
    ):
        with pytest.raises(UsageError, match=f"^{name} is longer than 131071 bytes$"):
            protocol.run(command)


def test_a_hundred_kilobytes_of_anything_fit() -> None:
    assert len(words(protocol.run(Run("c", "s", "p", [b"\n" * 100_000])))[-1]) == 100_000


@pytest.mark.parametrize("name", ["", "-", "-a", "A", "a b", "a" * 65, "ä", "a\n"])
def test_invalid_identifiers_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="identifier"):
        protocol.ping(name)


@pytest.mark.parametrize("number", [0, 65, -1])
def test_invalid_signals_are_refused(number: int) -> None:
    with pytest.raises(UsageError):
        protocol.signal("c", number)


CONTROL = {
    b"ready - 1 77 tty,resize ;\n": Ready(None, 1, 77, frozenset({"tty", "resize"})),
    b"ready n-1 1 77 tty ;\n": Ready("n-1", 1, 77, frozenset({"tty"})),
    b"pong x ;\n": Pong("x"),
    b"refused - 74 message ;\n": Refused(None, 74, "message"),
    b"refused c1 17 id ;\n": Refused("c1", 17, "id"),
    b"connected p1 4 ;\n": Connected("p1", 4),
    b"done c1 ;\n": Done("c1"),
    b"lost c1 ;\n": Lost("c1"),
    b"forked 0a ;\n": Forked("0a"),
}
STATUS = {
    b"started 5 ;\n": Started(5),
    b"closed stdin ;\n": InputClosed(),
    b"exit 255 0 18446744073709551615 ;\n": Exited(255, 0, 2**64 - 1),
    b"signal 9 1 2 ;\n": Signalled(9, 1, 2),
    b"error 127 2 exec ;\n": Failed(127, 2, "exec"),
}


def test_the_agents_messages_are_parsed() -> None:
    assert protocol.control_reader().feed(b"".join(CONTROL)) == list(CONTROL.values())
    assert protocol.status_reader().feed(b"".join(STATUS)) == list(STATUS.values())


@pytest.mark.parametrize(
    "line",
    [
        b"exit 0 0 0",
        b"exit 0 0 ;",
        b"exit 256 0 0 ;",
        b"exit -1 0 0 ;",
        b"exit 00 0 0 ;",
        b"exit \xd9\xa1 0 0 ;",
        b"exit 0 0 18446744073709551616 ;",
        b"exit 0  0 0 ;",
        b"signal 0 0 0 ;",
        b"signal 65 0 0 ;",
        b"error 1 2 exec ;",
        b"error 125 2 \x1b[2J ;",
        b"error 125 99999 exec ;",
        b"started 99999999999 ;",
        b"closed stdout ;",
        b";",
        b"\0",
    ],
)
def test_invalid_messages_are_malformed(line: bytes) -> None:
    assert protocol.status_reader().feed(line + b"\nstarted 1 ;\n") == [Malformed(line), Started(1)]


def test_a_long_line_is_malformed_once() -> None:
    reader = protocol.status_reader()
    found = [each for _ in range(1000) for each in reader.feed(b"x" * 100)]
    assert found == [Malformed(b"x" * 80)]
    assert reader.feed(b"x\nstarted 1 ;\n") == [Started(1)]


@given(
    stream=st.lists(
        st.sampled_from([*CONTROL, b"\n", b"x" * 300, b"lost ", b"\xff"]) | st.binary(max_size=9), max_size=9
    ),
    cuts=st.lists(st.integers(0, 2000), max_size=6),
)
def test_a_stream_may_be_split_anywhere(stream: list[bytes], cuts: list[int]) -> None:
    data = b"".join(stream)
    reader, found, start = protocol.control_reader(), [], 0
    for end in [*sorted(cuts), len(data)]:
        found += reader.feed(data[start:end])
        start = max(start, end)
    assert found == protocol.control_reader().feed(data)


def test_the_bounds_are_those_of_the_agent() -> None:
    source = Path(protocol.__file__).with_name("agent.c").read_text()
    section = re.search(r"These bounds are the same in protocol.py.*?\n\n", source, re.DOTALL)
    assert section
    bounds = dict(re.findall(r"#define (\w+) (.+)", section[0]))
    assert eval(bounds.pop("MESSAGE_MAX")) == protocol.MESSAGE_MAX
    assert eval(bounds.pop("WORDS_MAX")) == protocol.WORDS_MAX
    assert int(bounds.pop("ENVIRONMENT_MAX")) == protocol.ENVIRONMENT_MAX
    name_max = int(bounds.pop("NAME_MAX"))
    assert protocol._NAME.fullmatch("x" * name_max)
    assert not protocol._NAME.fullmatch("x" * (name_max + 1))
    assert not bounds
