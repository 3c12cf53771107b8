# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests the host names of copies."""

import pytest

from vmspawn.inside.identity import host_name


@pytest.mark.parametrize(
    ("machine", "expected"),
    [("web", "web"), ("web_2.old", "web-2-old"), ("-a-", "a"), ("x" * 80, "x" * 64), ("...", "copy")],
)
def test_a_host_name_has_letters_digits_and_dashes(machine: str, expected: str) -> None:
    assert host_name(machine) == expected
