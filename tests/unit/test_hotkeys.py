# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests the hot keys, typed at every speed and split at every byte."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmspawn.console.hotkeys import ESCAPE, WINDOW, Hotkeys, Key

E = ESCAPE

#: Bytes, each with the pause before it: eighths of a second, whose sums are exact. ^], p and r are frequent.
typing = st.lists(
    st.tuples(
        st.sampled_from([E, E, E, b"p", b"r", b"x", b"\x03"]),
        st.sampled_from([0.0, 0.125, 0.375, 0.5, 0.875, 1.0, 3.0]),
    ),
    max_size=24,
)


def type_slowly(keys: list[tuple[bytes, float]], *, timer: bool) -> list[bytes | Key]:
    """Type byte after byte, and wait after the last; with `timer`, check each deadline as an event loop would."""
    hotkeys, now = Hotkeys(), 100.0
    found: list[bytes | Key] = []
    for byte, pause in [*keys, (b"", 2 * WINDOW)]:
        now += pause
        while timer and hotkeys.deadline is not None and hotkeys.deadline <= now:
            found.append(hotkeys.expire(hotkeys.deadline))
        found += hotkeys.feed(byte, now)
    return joined(found)


def joined(found: list[bytes | Key]) -> list[bytes | Key]:
    """Return the same items, with adjacent bytes joined."""
    result: list[bytes | Key] = []
    for piece in found:
        if isinstance(piece, bytes) and result and isinstance(result[-1], bytes):
            result[-1] += piece
        elif piece != b"":
            result.append(piece)
    return result


@pytest.mark.parametrize("key", Key)
@pytest.mark.parametrize("split", range(4))
@pytest.mark.parametrize("pause", [0.0, 0.3, 0.99 * WINDOW])
def test_each_sequence_is_found_however_it_is_split(key: Key, split: int, pause: float) -> None:
    hotkeys = Hotkeys()
    found = hotkeys.feed(b"a" + key.value[:split], 0.0)
    found += hotkeys.feed(key.value[split:] + b"b", pause)
    assert joined(found) == [b"a", key, b"b"]


@pytest.mark.parametrize("key", Key)
def test_a_sequence_that_takes_a_second_is_for_the_guest(key: Key) -> None:
    hotkeys = Hotkeys()
    first, second, third = (bytes([byte]) for byte in key.value)
    found = [*hotkeys.feed(first, 0.0), *hotkeys.feed(second, 0.5), *hotkeys.feed(third, WINDOW)]
    found.append(hotkeys.expire(10.0))
    assert joined(found) == [key.value]


def test_the_second_is_counted_back_from_the_last_key() -> None:
    keys = [(E, 0.0), (E, 0.8), (E, 0.8), (E, 0.1)]
    assert type_slowly(keys, timer=True) == [E, Key.END]


@pytest.mark.parametrize("typed", [E, E + b"x", E + E + b"x", E + b"p", E + b"r", b"p", E + E, E + E + b"P", E + b"xp"])
def test_other_input_reaches_the_guest_unchanged(typed: bytes) -> None:
    hotkeys = Hotkeys()
    assert joined([*hotkeys.feed(typed, 0.0), hotkeys.expire(WINDOW)]) == [typed]


def test_only_an_escape_is_held_back() -> None:
    hotkeys = Hotkeys()
    assert hotkeys.feed(b"x" + E, 5.0) == [b"x"]
    assert hotkeys.deadline == 5.0 + WINDOW
    assert hotkeys.expire(5.0 + WINDOW) == E
    assert hotkeys.deadline is None


@given(typing, st.booleans())
def test_nothing_is_lost_added_or_moved(keys: list[tuple[bytes, float]], timer: bool) -> None:
    found = type_slowly(keys, timer=timer)
    assert b"".join(piece.value if isinstance(piece, Key) else piece for piece in found) == b"".join(
        byte for byte, _ in keys
    )


@given(typing)
def test_the_keys_and_bytes_do_not_depend_on_the_timer(keys: list[tuple[bytes, float]]) -> None:
    assert type_slowly(keys, timer=True) == type_slowly(keys, timer=False)


@given(st.lists(st.sampled_from([E, E, b"p", b"r", b"x"])).map(b"".join), st.data())
def test_splitting_bytes_that_come_at_once_changes_nothing(typed: bytes, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(0, len(typed)))) | {0, len(typed)})
    whole, split = Hotkeys(), Hotkeys()
    pieces = [piece for start, end in pairwise(cuts) for piece in split.feed(typed[start:end], 0.0)]
    assert joined([*pieces, split.expire(WINDOW)]) == joined([*whole.feed(typed, 0.0), whole.expire(WINDOW)])


@given(typing)
def test_a_key_is_found_exactly_where_its_three_bytes_come_within_the_window(
    keys: list[tuple[bytes, float]],
) -> None:
    """This states the rule directly: each byte is checked with the two before it that no key has used."""
    expected: list[Key] = []
    times, unused, now = [], 0, 0.0
    for byte, pause in keys:
        now += pause
        times.append((byte, now))
        unused += 1
        last = b"".join(each for each, _ in times[-3:])
        in_time = unused >= 3 and now < times[-3][1] + WINDOW
        if in_time and any(last == key.value for key in Key):
            expected.append(Key(last))
            unused = 0
    assert [piece for piece in type_slowly(keys, timer=True) if isinstance(piece, Key)] == expected
