# SPDX-License-Identifier: LGPL-2.1-or-later
"""Finds the message of a kernel panic in the guest's output.

pvpanic does not report all panics: some kernels lack its driver, and early panics come before the driver is loaded.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from ..text import printable

_MARK = b"Kernel panic - not syncing"

# The message begins a line, or follows a timestamp and, with CONFIG_PRINTK_CALLER, the caller's id. The last line of a
# panic, "---[ end Kernel panic …", repeats the message and does not match.
_MESSAGE = re.compile(
    rb"(?:(?:^|[\r\n])|\[ *[0-9]+\.[0-9]+\](?:\[[^\]\r\n]*\])? )Kernel panic - not syncing(?:: *([^\r\n]*))?[\r\n]"
)

#: The maximum length of a reported message, in characters.
_LENGTH_MAX = 200

#: Bytes of past output that are kept, since a message may come in pieces.
_TAIL = 1024


class PanicFinder:
    """Finds the panics in output that comes in pieces."""

    def __init__(self) -> None:
        self._tail = b""

    def feed(self, data: bytes) -> list[str]:
        """Take output; returns the messages that it completes, safe to print."""
        seen = self._tail + data
        if _MARK not in seen:
            self._tail = seen[-_TAIL:]
            return []
        found = list(_MESSAGE.finditer(seen))
        rest = seen[found[-1].end() - 1 :] if found else seen
        self._tail = rest[-_TAIL:]
        return [printable((each[1] or b"").decode(errors="replace").strip())[:_LENGTH_MAX] for each in found]


class OutputWatch:
    """A viewer that looks for panics, and notes whether the guest prints anything."""

    is_full = False

    def __init__(self, on_panic: Callable[[str], None]) -> None:
        """Watch the output. `on_panic` is called with the message of each panic."""
        self._finder = PanicFinder()
        self._on_panic = on_panic
        #: True after the first output.
        self.has_output = False

    def show(self, data: bytes) -> None:
        """Take output."""
        self.has_output = True
        for message in self._finder.feed(data):
            self._on_panic(message)

    def finish(self) -> bool:
        """Return True: this viewer buffers no output."""
        return True
