# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests printing untrusted names, with every byte that a file name may have."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmspawn.boot.diagnose import explain_failure
from vmspawn.errors import CommandFailed
from vmspawn.manager.job import Tail
from vmspawn.storage.disk import check_disk_name, default_name
from vmspawn.text import console_lines, printable, utf8


@pytest.mark.parametrize(
    ("name", "line"),
    [
        (b"plain name", "plain name"),
        ("größe.img".encode(), "größe.img"),
        (b"two\nlines", r"two\nlines"),
        (b"\x1b[31mred", r"\x1b[31mred"),
        (b"latin \xff", r"latin \xff"),
        (b"half \xe2\x82", r"half \xe2\x82"),
    ],
)
def test_unprintable_characters_are_escaped(name: bytes, line: str) -> None:
    assert printable(os.fsdecode(name)) == line


@given(st.binary(min_size=1, max_size=60))
def test_every_name_is_text_and_one_line(name: bytes) -> None:
    decoded = os.fsdecode(name)
    assert utf8(decoded).encode().decode() == utf8(decoded)
    assert printable(decoded).isprintable()
    assert printable(printable(decoded)) == printable(decoded)


@pytest.mark.parametrize(
    ("output", "lines"),
    [
        ("", []),
        ("\r\n \r\n", []),
        ("one\r\n\r\ntwo\r\r\nthree", ["one", "", "two", "three"]),
        ("\x1bc\x1b[?7l\x1b[2J\x1b[0mSeaBIOS\x1b(B", ["SeaBIOS"]),
        ("\x1b[6n\x1b[c\x1b[0;31mred\x1b[m", ["red"]),
        ("\x1b]0;title\x07a\x1bP$qm\x1b\\b", ["ab"]),
        ("\x1b]0;no end\nnext", [r"\x1b]0;no end", "next"]),
        ("\x1b[\x1b[6n6n", [r"\x1b[6n"]),
        ("\x9b6n\x90x\x07\u202e", [r"\x9b6n\x90x\x07\u202e"]),
        ("a\tb", ["a       b"]),
        ("10%\r20%", [r"10%\r20%"]),
    ],
)
def test_a_consoles_lines_have_no_control_sequences(output: str, lines: list[str]) -> None:
    assert console_lines(output) == lines


def test_a_surrogate_that_stands_for_no_byte_is_escaped() -> None:
    assert printable("a\ud800\n") == r"a\ud800\n"


_HOSTILE = st.lists(
    st.sampled_from(["\x1b", "[", "]", "P", "\\", "6n", "\x07", "\x9b", "\r", "\n", "\t", "0;", "a", "\ud800"])
).map("".join)


@given(_HOSTILE)
def test_no_output_of_a_guest_reaches_the_terminal_as_a_control_character(text: str) -> None:
    tail = Tail()
    tail.show(text.encode(errors="replace"))
    shown = [*console_lines(text), *tail.lines()]
    shown.append(str(CommandFailed.of(1, b"", text.encode(errors="replace"))))
    shown.append(str(explain_failure("box", [], "ended", text)))
    assert all(line.isprintable() for line in shown)


@given(st.binary(min_size=1, max_size=60).filter(lambda name: b"/" not in name))
def test_every_file_has_a_name_for_its_disk(name: bytes) -> None:
    assert check_disk_name(default_name(f"/folder/{os.fsdecode(name)}"))
