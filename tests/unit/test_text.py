# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests printing untrusted names, with every byte that a file name may have."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmspawn.storage.disk import check_disk_name, default_name
from vmspawn.text import printable, utf8


@pytest.mark.parametrize(
    ("name", "line"),
    [
        (b"plain name", "plain name"),
        ("größe.img".encode(), "größe.img"),
        (b"two\nlines", r"two\nlines"),
        (b"\x1b[31mred", r"\x1b[31mred"),
        (b"latin \xff", r"latin \xff"),
        (b"half \xe2\x82", r"half \xe2\x82"),
    ],
)
def test_unprintable_characters_are_escaped(name: bytes, line: str) -> None:
    assert printable(os.fsdecode(name)) == line


@given(st.binary(min_size=1, max_size=60))
def test_every_name_is_text_and_one_line(name: bytes) -> None:
    decoded = os.fsdecode(name)
    assert utf8(decoded).encode().decode() == utf8(decoded)
    assert printable(decoded).isprintable()
    assert printable(printable(decoded)) == printable(decoded)


@given(st.binary(min_size=1, max_size=60).filter(lambda name: b"/" not in name))
def test_every_file_has_a_name_for_its_disk(name: bytes) -> None:
    assert check_disk_name(default_name(f"/folder/{os.fsdecode(name)}"))
