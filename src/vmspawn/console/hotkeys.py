# SPDX-License-Identifier: LGPL-2.1-or-later
"""The keys that vmspawn keeps for itself, found among what is typed: a state machine that is told the time.

They are systemd-nspawn's: `^]^]^]`, `^]^]r` and `^]^]p`, each within a second. Everything else goes to the guest as it
was typed, in its order. A ^] is held back until the next key, or its second, decides what it was.
"""

from __future__ import annotations

from collections import deque
from enum import Enum

#: Ctrl-].
ESCAPE = b"\x1d"

#: Seconds that a sequence may take from its first key to its last, as in systemd-nspawn.
WINDOW = 1.0

#: The line that says which keys there are, as systemd-nspawn prints one.
HELP = "press ^] three times within 1s to end the machine, ^]^]p to power it off, ^]^]r to reboot it"


class Key(Enum):
    """What a sequence asks for. The value is what is typed."""

    END = ESCAPE * 3
    POWER_OFF = ESCAPE * 2 + b"p"
    REBOOT = ESCAPE * 2 + b"r"


_LAST = {key.value[2:]: key for key in (Key.POWER_OFF, Key.REBOOT)}


class Hotkeys:
    """Splits what is typed into bytes for the guest and keys for us.

    Times are seconds of any clock that never goes back.
    """

    def __init__(self) -> None:
        # When each ^] was typed that is held back: none, one or two of them.
        self._held: deque[float] = deque()

    @property
    def deadline(self) -> float | None:
        """When `expire` will have something to hand out, or None if nothing is held back."""
        return self._held[0] + WINDOW if self._held else None

    def expire(self, now: float) -> bytes:
        """Each ^] that was held back and has had its second; it is for the guest."""
        late = 0
        while self._held and now >= self._held[0] + WINDOW:
            self._held.popleft()
            late += 1
        return ESCAPE * late

    def feed(self, data: bytes, now: float) -> list[bytes | Key]:
        """What was typed now: the bytes for the guest and the keys, in the order of typing."""
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
        """One byte that is a ^] or follows one: what is for the guest by now, perhaps nothing, or a key."""
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
