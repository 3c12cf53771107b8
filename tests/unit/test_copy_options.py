# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests the options of copies that start in the background."""

import pytest

from vmspawn.errors import UsageError
from vmspawn.network.forward import Forward
from vmspawn.snapshots.background import CopyOptions

REFUSED = [
    (CopyOptions(console="interactive"), 1, "has no terminal"),
    (CopyOptions(console="native"), 1, "has no terminal"),
    (CopyOptions(console_log="/log"), 2, "one file for 2 copies"),
    (CopyOptions(forwards=(Forward(80), Forward(22, 2222))), 3, "one port of the host for 3 copies"),
]


@pytest.mark.parametrize(("options", "copies", "reason"), REFUSED)
def test_options_that_copies_cannot_have_are_refused(options: CopyOptions, copies: int, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        options.check(copies)


def test_one_copy_may_have_what_several_cannot_share() -> None:
    CopyOptions(console="gui", console_log="/log", forwards=(Forward(22, 2222),)).check(1)
    CopyOptions(forwards=(Forward(22),)).check(20)


def test_the_options_of_a_copy_become_options_of_vmspawn() -> None:
    options = CopyOptions(keep_disks=True, console_log="/log", forwards=(Forward(53, 0, "127.0.0.2", "udp"),), parent=7)
    expected = {"--console=headless", "--keep", "--log=/log", "--forward=127.0.0.2:0:53/udp", "--parent-pid=7"}
    assert set(options.arguments()) == expected
