# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests the parts of a failed test's report that need no machine."""

from vmspawn.qmp.events import Event
from vmspawn.testing import report
from vmspawn.testing.report import Command


def test_commands_are_listed_with_their_status_and_failures_with_their_last_lines() -> None:
    commands = [
        Command("uname -s", "0", "noise\n"),
        Command(["grep", "a b", "/etc/passwd"], "1", b""),
        Command("make " + "x" * 200, "2", "".join(f"line {number}\n" for number in range(9))),
        Command("\x1b[31m", "127", b"\x07 not found\n"),
    ]
    assert report._commands(commands).splitlines() == [
        "  0  uname -s",
        "  1  grep 'a b' /etc/passwd",
        f"  2  make {'x' * 95}…",
        *(f"     line {number}" for number in range(4, 9)),
        r"127  \x1b[31m",
        r"     \x07 not found",
    ]


def test_events_of_ports_that_vmspawn_plugs_in_itself_are_left_out() -> None:
    own = [
        Event("VSERPORT_CHANGE", {"open": True, "id": "agent"}),
        Event("VSERPORT_CHANGE", {"open": True, "id": "stream12"}),
        Event("DEVICE_DELETED", {"device": "stream0", "path": "/machine/peripheral/stream0"}),
    ]
    others = [
        Event("VSERPORT_CHANGE", {"open": True, "id": "mine"}),
        Event("DEVICE_DELETED", {"path": "/machine/peripheral-anon/device[0]"}),
        Event("STOP", None),
    ]
    assert [report._is_own(event) for event in own + others] == [True] * 3 + [False] * 3
