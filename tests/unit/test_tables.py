# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests that tables fit the terminal."""

import sys

from hypothesis import given
from hypothesis import strategies as st

from tests.terminal import Tty
from vmspawn.cli.tables import fitting

WIDTHS = st.lists(st.integers(1, 60), min_size=1, max_size=12)


@given(WIDTHS, st.integers(1, 200))
def test_as_many_columns_are_shown_as_fit(widths: list[int], limit: int) -> None:
    found = fitting(widths, limit)
    assert found == widths[: len(found)]
    assert len(found) == 1 or sum(found) + len(found) - 1 <= limit
    if len(found) < len(widths):
        assert sum(found) + len(found) + widths[len(found)] > limit


def test_a_table_that_is_too_wide_is_shown_as_fields_on_a_terminal() -> None:
    program = "from vmspawn.cli.tables import print_table\n"
    program += "print_table(('NAME', 'FILE'), (('a', 'x' * 20), ('bc', 'y')), fit={fit})\n"
    fields = f"NAME: a\r\nFILE: {'x' * 20}\r\n\r\nNAME: bc\r\nFILE: y\r\n"
    table = "\033[4mNAME\033[0m\r\na\r\nbc\r\n"
    for columns, fit, expected in ((24, False, fields), (24, True, table)):
        tty = Tty(columns=columns)
        try:
            process = tty.start([sys.executable, "-c", program.format(fit=fit)], COLUMNS="")
            assert tty.wait(process) == 0
            assert tty.everything.decode() == expected
        finally:
            tty.close()
