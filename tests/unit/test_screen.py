# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests the record of a terminal's modes, however the output is split, and the sequence that resets them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmspawn.console.terminal import Screen

ENTER, LEAVE = b"\x1b[?1049h", b"\x1b[?1049l"


def shown(*pieces: bytes) -> Screen:
    screen = Screen()
    for piece in pieces:
        screen.show(piece)
    return screen


def test_a_screen_without_output_needs_no_reset() -> None:
    assert shown().reset() == b""
    assert shown().at_line_start


@pytest.mark.parametrize(("text", "expected"), [(b"a\r\n", True), (b"a", False), (b"a\r", False)])
def test_the_start_of_a_line_is_recognized(text: bytes, expected: bool) -> None:
    assert shown(text).at_line_start is expected


@given(st.integers(0, len(ENTER)))
def test_the_alternate_screen_is_left_if_it_was_entered(cut: int) -> None:
    text = b"before" + ENTER
    assert LEAVE in shown(text[: 6 + cut], text[6 + cut :]).reset()


@given(st.lists(st.sampled_from([ENTER, LEAVE, b"text", b"\x1b[31m"])))
def test_only_the_last_switch_of_screens_counts(pieces: list[bytes]) -> None:
    switches = [piece for piece in pieces if piece in (ENTER, LEAVE)]
    together, apart = shown(b"".join(pieces)), shown(*pieces)
    assert together.reset() == apart.reset()
    assert (LEAVE in apart.reset()) == (switches[-1:] == [ENTER])
