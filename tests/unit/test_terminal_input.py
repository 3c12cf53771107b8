# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests ending a terminal's input, on a terminal of the kernel."""

import os
import select

import pytest

from vmspawn.inside.terminal_input import end_of_input

DEADLINE = 10.0


def read(terminal: int) -> bytes:
    """Read once from a terminal."""
    assert select.select([terminal], [], [], DEADLINE)[0], "the terminal has nothing to read"
    return os.read(terminal, 4096)


@pytest.mark.parametrize("typed", [b"", b"line\n", b"line\r", b"two\nlines\n", b"unfinished", b"line\nunfinished"])
def test_a_program_reads_the_whole_input_and_then_its_end_once(typed: bytes) -> None:
    ours, theirs = os.openpty()
    try:
        os.write(ours, typed + end_of_input(typed))
        found = b""
        while data := read(theirs):
            found += data
        assert found == typed.replace(b"\r", b"\n")
        assert not select.select([theirs], [], [], 0)[0]
    finally:
        os.close(ours)
        os.close(theirs)
