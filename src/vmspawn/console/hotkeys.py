# SPDX-License-Identifier: LGPL-2.1-or-later
"""Finds vmspawn's own key sequences in typed input.

The sequences are those of systemd-nspawn: `^]^]^]`, `^]^]r` and `^]^]p`, each typed within a second. All other input
goes to the guest unchanged and in order. A ^] is held back until the next key, or for a second. The caller passes the
time.
"""

from __future__ import annotations

from collections import deque
from enum import Enum

#: Ctrl-].
ESCAPE = b"\x1d"

#: Seconds that a sequence may take from its first key to its last, as in systemd-nspawn.
WINDOW = 1.0

#: The line that explains the keys. It fits a terminal of 80 columns.
HELP = "keys: ^]^]^] ends the machine, ^]^]p powers it off, ^]^]r reboots it"


class Key(Enum):
    """The action of a key sequence. The value is the sequence."""

    END = ESCAPE * 3
    POWER_OFF = ESCAPE * 2 + b"p"
    REBOOT = ESCAPE * 2 + b"r"


_LAST = {key.value[2:]: key for key in (Key.POWER_OFF, Key.REBOOT)}


class Hotkeys:
    """Splits typed input into bytes for the guest and key sequences for vmspawn.

    Times are seconds of any monotonic clock.
    """

    def __init__(self) -> None:
        # The times at which the held ^] were typed: at most two.
        self._held: deque[float] = deque()

    @property
    def deadline(self) -> float | None:
        """The time at which `expire` will return something, or None if nothing is held back."""
        return self._held[0] + WINDOW if self._held else None

    def expire(self, now: float) -> bytes:
        """Return each held ^] that is older than a second, for the guest."""
        late = 0
        while self._held and now >= self._held[0] + WINDOW:
            self._held.popleft()
            late += 1
        return ESCAPE * late

    def feed(self, data: bytes, now: float) -> list[bytes | Key]:
        """Take typed input; returns the bytes for the guest and the keys, in the order of typing."""
        found: list[bytes | Key] = []
        passed = bytearray(self.expire(now))
        position = 0
        while position < len(data):
            if not self._held:
                start = data.find(ESCAPE, position)
                start = len(data) if start < 0 else start
                passed += data[position:start]
                position = start
            if position < len(data):
                taken = self._take(data[position : position + 1], now)
                position += 1
                if isinstance(taken, bytes):
                    passed += taken
                    continue
                if passed:
                    found.append(bytes(passed))
                    passed.clear()
                found.append(taken)
        if passed:
            found.append(bytes(passed))
        return found

    def _take(self, byte: bytes, now: float) -> bytes | Key:
        """Take a ^], or the byte after one; returns a key, or bytes for the guest, possibly b""."""
        if byte == ESCAPE:
            self._held.append(now)
            if len(self._held) < 3:
                return b""
            self._held.clear()
            return Key.END
        held = ESCAPE * len(self._held)
        self._held.clear()
        if len(held) == 2 and byte in _LAST:
            return _LAST[byte]
        return held + byte
