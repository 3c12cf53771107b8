# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests the syntax of the conditions that `vmctl wait` accepts."""

import contextlib
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmspawn.errors import UsageError
from vmspawn.inside.conditions import KINDS, Condition, parse


@pytest.mark.parametrize("text", ["agent", "booted", "off", "ssh", "port=80", "disk=data.raw", "console=a|b=c"])
def test_a_condition_is_parsed_as_it_is_written(text: str) -> None:
    assert str(parse(text)) == text


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "no condition"),
        ("ready", "no condition ready"),
        ("agent=yes", "agent=yes is not a condition"),
        ("agent=", "is not a condition"),
        ("disk", "is not a condition"),
        ("disk=", "is not a condition"),
        ("port=0", "not a port"),
        ("port=65536", "not a port"),
        ("port=http", "not a port"),
        ("port=٣", "not a port"),
        ("console=(", "not a regular expression"),
        ("console=a{99999999999999999999}", "not a regular expression: the repetition number is too large"),
        ("console=" + "(" * 5000 + ")" * 5000, "not a regular expression: maximum recursion depth"),
    ],
)
def test_invalid_conditions_are_refused_with_a_hint(text: str, why: str) -> None:
    with pytest.raises(UsageError, match=why) as caught:
        parse(text)
    assert caught.value.hint


def test_a_regular_expression_causes_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert parse("console=[[a]").value == "[[a]"


@given(st.sampled_from(sorted(KINDS)), st.text())
def test_any_text_is_a_condition_or_is_refused(kind: str, value: str) -> None:
    with contextlib.suppress(UsageError):
        assert parse(f"{kind}={value}") == Condition(kind, value)
