# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests finding kernel panics in the guest's output, and their effect on the reason of a machine's end."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmspawn.console.panic import PanicFinder
from vmspawn.machine.ending import End

ROOT = b"Kernel panic - not syncing: VFS: Unable to mount root fs on unknown-block(0,0)\r\n"
MESSAGE = "VFS: Unable to mount root fs on unknown-block(0,0)"

#: The output of Linux 6.1 at the end of a panic.
WHOLE = (
    b"[    1.804118] /dev/root: Can't open blockdev\r\n"
    b"[    1.804353] " + ROOT + b"[    1.804712] CPU: 0 PID: 1 Comm: swapper/0 Not tainted 6.1.0-37-cloud-amd64 #1\r\n"
    b"[    1.806718] ---[ end " + ROOT.rstrip() + b" ]---\r\n"
)


@pytest.mark.parametrize(
    ("printed", "expected"),
    [
        (ROOT, [MESSAGE]),
        (WHOLE, [MESSAGE]),
        (b"# [   12.345678] Kernel panic - not syncing: sysrq triggered crash\r\n", ["sysrq triggered crash"]),
        (b"[    0.1][    T1] Kernel panic - not syncing\r\n", [""]),
        (b"\n[    0.100000][    T1] " + ROOT, [MESSAGE]),
        (b"Kernel panic - not syncing: cut sho", []),
        (b"echo 'Kernel panic - not syncing: no'\r\n", []),
        (b"[    1.806718] ---[ end " + ROOT, []),
        (b"Kernel panic - not syncing: \x1b[6n\x07\r\n", [r"\x1b[6n\x07"]),
        (ROOT + b"rebooted\r\n" + ROOT, [MESSAGE, MESSAGE]),
    ],
)
def test_the_kernels_own_messages_are_found(printed: bytes, expected: list[str]) -> None:
    assert PanicFinder().feed(printed) == expected


@given(st.lists(st.integers(0, len(WHOLE)), max_size=8), st.binary(max_size=3000))
def test_a_message_in_pieces_is_found_once(cuts: list[int], before: bytes) -> None:
    if b"Kernel panic" in before:
        return
    finder = PanicFinder()
    finder.feed(before + b"\r\n")
    edges = [0, *sorted(cuts), len(WHOLE)]
    found = [each for start, end in itertools.pairwise(edges) for each in finder.feed(WHOLE[start:end])]
    assert found == [MESSAGE]


QUIT = End.terminated()
OFF = End("guest-shutdown", "the guest powered off", True)
RESET = End("guest-reset", "the guest requested a reboot, which this machine does not support", True)
DIED = End("qemu-died", "QEMU died of SIGSEGV", False)


@pytest.mark.parametrize("end", [QUIT, RESET])
def test_a_machine_whose_kernel_panicked_did_not_end_well(end: End) -> None:
    assert end.after(panic="the guest's kernel panicked: x", limit=None) == End(
        "guest-panic", "the guest's kernel panicked: x", False
    )
    assert end.after(panic="", limit=None) == end


def test_a_guest_that_powered_off_did_not_panic_whatever_it_printed() -> None:
    assert OFF.after(panic="the guest's kernel panicked: x", limit=None) == OFF
    assert DIED.after(panic="the guest's kernel panicked: x", limit=None) == DIED


def test_a_time_limit_counts_only_for_a_machine_that_it_ended() -> None:
    ended = QUIT.after(panic="the guest's kernel panicked: x", limit=2.5)
    assert ended == End("time-limit", "the machine was ended after 2.5 s; the guest's kernel panicked: x", False)
    assert OFF.after(panic="", limit=2.5) == OFF
