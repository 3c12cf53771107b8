# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests that a Record behaves like a NamedTuple."""

from __future__ import annotations

import copy
import pickle
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmspawn.record import Record


class Made(Record):
    """A record."""

    a: int
    b: str
    c: tuple[int, ...] = ()

    @property
    def both(self) -> str:
        return f"{self.a}{self.b}"


class Known(NamedTuple):
    a: int
    b: str
    c: tuple[int, ...] = ()


@given(st.integers(), st.text(), st.lists(st.integers()).map(tuple))
def test_a_record_equals_a_named_tuple(a: int, b: str, c: tuple[int, ...]) -> None:
    made, known = Made(a, b, c), Known(a, b, c)
    assert tuple(made) == tuple(known)
    assert hash(made) == hash(known)
    assert (made.a, made.b, made.c, made[1]) == (a, b, c, b)
    assert made._asdict() == known._asdict()
    assert tuple(made._replace(b="other")) == tuple(known._replace(b="other"))
    assert repr(made) == repr(known).replace("Known", "Made")
    assert made.both == f"{a}{b}"
    assert copy.deepcopy(made) == pickle.loads(pickle.dumps(made)) == made
    assert type(made._replace(a=1)) is Made


def test_defaults_and_names_fill_in_fields() -> None:
    assert Made(1, b="x") == Made(b="x", a=1) == (1, "x", ())
    assert Made._fields == ("a", "b", "c")
    assert Made._field_defaults == {"c": ()}


@pytest.mark.parametrize(
    ("values", "named", "reason"),
    [((1,), {}, "'b'"), ((1, "x", (), 4), {}, "3 fields"), ((1, "x"), {"d": 4}, "d"), ((1, "x"), {"a": 4}, "a")],
)
def test_an_error_names_the_wrong_value(values: tuple[Any, ...], named: dict[str, Any], reason: str) -> None:
    made: Any = Made
    with pytest.raises(TypeError, match=reason):
        made(*values, **named)


def test_a_replacement_of_an_unknown_field_is_an_error() -> None:
    made: Any = Made(1, "x")
    with pytest.raises(TypeError, match="no such field: d"):
        made._replace(b="y", d=4)


def test_a_field_cannot_be_set() -> None:
    made: Any = Made(1, "x")
    with pytest.raises(AttributeError):
        made.a = 2
    with pytest.raises(AttributeError):
        made.other = 2
