# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests the library's console with given output: the text that `expect` finds, keeps and discards."""

import asyncio
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmspawn.api.console import TEXT_MAX, Console
from vmspawn.errors import MachineEnded, Timeout


def console(*shown: bytes) -> Console:
    made = Console("box", lambda _: None)
    for data in shown:
        made.show(data)
    return made


async def test_expect_finds_earlier_output_and_consumes_it() -> None:
    shown = console(b"Booting\r\nbox login: ")
    found = await shown.expect(r"(\w+) login: ")
    assert (found[1], shown.before) == ("box", "Booting\n")
    shown.show(b"root\nbox login: ")
    await shown.expect("login: ")
    assert shown.before == "root\nbox "
    assert shown.text == "Booting\nbox login: root\nbox login: "


async def test_expect_waits_for_output_in_pieces() -> None:
    shown = console()
    waiting = asyncio.create_task(shown.expect(re.compile("^done$", re.MULTILINE)))
    for piece in (b"do", b"ne", b"\r", b"\n"):
        await asyncio.sleep(0)
        shown.show(piece)
    assert (await waiting)[0] == "done"


async def test_a_timeout_shows_the_last_lines_harmlessly() -> None:
    shown = console(b"one\n\n \n\n", b"two \x1b[31mred\x07\n")
    with pytest.raises(Timeout, match=r"^the console of box did not show 'three' within 0 s(\n|$)") as caught:
        await shown.expect("three", timeout=0)
    assert caught.value.__notes__ == ["the console's last lines:\n    one\n    \n    two red\\x07"]
    assert shown.before == "one\n\n \n\ntwo \x1b[31mred\x07\n"


async def test_the_end_of_the_console_is_an_error_of_its_own() -> None:
    shown = console(b"panic\n")
    waiting = asyncio.create_task(shown.expect("login"))
    await asyncio.sleep(0)
    shown.finish()
    with pytest.raises(MachineEnded, match=r"^the console of box was closed before it showed 'login'(\n|$)") as caught:
        await waiting
    assert "    panic" in caught.value.__notes__[0]
    with pytest.raises(MachineEnded):
        await shown.send("x")
    assert (await shown.expect("panic"))[0] == "panic"


async def test_the_kept_output_is_bounded() -> None:
    shown = console(b"begin\n")
    await shown.expect("begin\n")
    for _ in range(TEXT_MAX // 65536 + 1):
        shown.show(b"x" * 65536)
    assert len(shown.text) == TEXT_MAX
    shown.show(b"end")
    await shown.expect("end", timeout=0)
    assert shown.before == "x" * (TEXT_MAX - 3)


@given(st.lists(st.sampled_from([b"a", b"\r", b"\n", "\u00e9".encode(), b"\xff"])), st.data())
def test_the_text_does_not_depend_on_the_pieces_of_the_output(parts: list[bytes], data: st.DataObject) -> None:
    whole = b"".join(parts)
    cut = data.draw(st.integers(0, len(whole)))
    assert console(whole[:cut], whole[cut:]).text == console(whole).text
    assert "\r\n" not in console(whole).text
