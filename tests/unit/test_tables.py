# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests that tables fit the terminal."""

from hypothesis import given
from hypothesis import strategies as st

from vmspawn.cli.tables import fitting

WIDTHS = st.lists(st.integers(1, 60), min_size=1, max_size=12)


@given(WIDTHS, st.integers(1, 200))
def test_as_many_columns_are_shown_as_fit(widths: list[int], limit: int) -> None:
    found = fitting(widths, limit)
    assert found == widths[: len(found)]
    assert len(found) == 1 or sum(found) + len(found) - 1 <= limit
    if len(found) < len(widths):
        assert sum(found) + len(found) + widths[len(found)] > limit
