# SPDX-License-Identifier: LGPL-2.1-or-later
"""Find the message of a kernel panic in what the guest prints.

Not every kernel has a driver for pvpanic, and none has one before it has loaded it.
"""

from __future__ import annotations

import re
from collections.abc import Callable

_MARK = b"Kernel panic - not syncing"

# The kernel begins a line with it, or prints it behind a timestamp and perhaps the thread, whatever stands before that.
# The last line of a panic, "---[ end Kernel panic …", repeats the message.
_MESSAGE = re.compile(
    rb"(?:(?:^|[\r\n])|\[ *[0-9]+\.[0-9]+\](?:\[[^\]\r\n]*\])? )Kernel panic - not syncing(?:: *([^\r\n]*))?[\r\n]"
)

#: Characters of a message that are reported.
_LENGTH_MAX = 200

#: Bytes that are kept of what was printed: a message may come in pieces.
_TAIL = 1024


class PanicFinder:
    """Finds the panics in output that comes in pieces."""

    def __init__(self) -> None:
        self._tail = b""

    def feed(self, data: bytes) -> list[str]:
        """Take output; returns the messages of panics that are complete now."""
        seen = self._tail + data
        if _MARK not in seen:
            self._tail = seen[-_TAIL:]
            return []
        found = list(_MESSAGE.finditer(seen))
        rest = seen[found[-1].end() - 1 :] if found else seen
        self._tail = rest[-_TAIL:]
        return [(each[1] or b"").decode(errors="replace").strip()[:_LENGTH_MAX] for each in found]


class OutputWatch:
    """A viewer that shows nothing to anybody: it looks for panics, and whether anything is printed at all."""

    is_full = False

    def __init__(self, on_panic: Callable[[str], None]) -> None:
        """`on_panic` is called with the message of each panic."""
        self._finder = PanicFinder()
        self._on_panic = on_panic
        #: Whether the guest has printed anything.
        self.has_output = False

    def show(self, data: bytes) -> None:
        """Take output."""
        self.has_output = True
        for message in self._finder.feed(data):
            self._on_panic(message)

    def finish(self) -> None:
        """There is nothing left to be shown."""
