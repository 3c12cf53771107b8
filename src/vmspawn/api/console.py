# SPDX-License-Identifier: LGPL-2.1-or-later
"""Lets programs wait for the console's output, and type on the console."""

from __future__ import annotations

import asyncio
import codecs
import re
from collections.abc import Callable

from ..errors import MachineEnded, Timeout
from ..text import console_lines

#: Characters of the console that are kept.
TEXT_MAX = 1 << 20

#: The default timeout of `expect`, in seconds, as in pexpect.
EXPECT_TIMEOUT = 30.0

#: Lines of the console that an error shows.
_SHOWN = 20

_LINE_END = re.compile(r"\r+\n")


class Console:
    """The guest's console.

        await machine.console.expect("login: ", timeout=60)
        await machine.console.send_line("root")
        found = await machine.console.expect(r"Linux (\\S+)")
        print(found[1], machine.console.before)

    As with pexpect, each `expect` searches after the previous match, and `before` is the text between both matches.
    Output is decoded as UTF-8, and lines end with a line feed. The last 1 MiB is kept.
    """

    def __init__(self, machine: str, write: Callable[[bytes], None]) -> None:
        self._machine = machine
        self._write = write
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._text = ""
        #: Carriage returns at the end of the output, which may be part of a line end.
        self._held = ""
        #: The position where the next `expect` begins.
        self._position = 0
        self._ended = False
        self._changed = asyncio.Event()
        self._before = ""

    def __repr__(self) -> str:
        state = "ended" if self._ended else "open"
        return f"<Console of {self._machine!r}, {state}: {len(self._text)} characters>"

    @property
    def text(self) -> str:
        """The console's output, at most its last 1 MiB. `expect` does not consume it.

        If another process manages the machine, reading begins when `console` is first used, with the last 64 KiB.
        """
        return self._text + self._held

    @property
    def before(self) -> str:
        """The text before the last match of `expect`, or all text that it searched if it failed."""
        return self._before

    async def send(self, text: str | bytes) -> None:
        """Type exactly this text on the console: end a line with "\\n", or use `send_line`.

        Raises MachineEnded if the console is closed.
        """
        if self._ended:
            raise MachineEnded(f"the console of {self._machine} is closed")
        self._write(text.encode() if isinstance(text, str) else text)

    async def send_line(self, text: str = "") -> None:
        """Type a line on the console. Raises the errors of `send`."""
        await self.send(f"{text}\n")

    async def expect(self, pattern: str | re.Pattern[str], timeout: float | None = EXPECT_TIMEOUT) -> re.Match[str]:
        """Wait until the console shows text that a regular expression matches, and return the match.

        The search includes earlier output that no `expect` has consumed. In a pattern that is not compiled, `.` also
        matches line ends (re.DOTALL). `timeout` is in seconds; None waits for ever.

        Raises Timeout, or MachineEnded if the machine ends first; both show the console's last lines.
        """
        compiled = re.compile(pattern, re.DOTALL) if isinstance(pattern, str) else pattern
        try:
            async with asyncio.timeout(timeout):
                return await self._find(compiled)
        except TimeoutError:
            self._before = self._text[self._position :]
            what = f"the console of {self._machine} did not show {compiled.pattern!r} within {timeout:g} s"
            raise self._noted(Timeout(what)) from None

    async def _find(self, pattern: re.Pattern[str]) -> re.Match[str]:
        while True:
            if found := pattern.search(self._text, self._position):
                self._before = self._text[self._position : found.start()]
                self._position = found.end()
                return found
            if self._ended:
                self._before = self._text[self._position :]
                what = f"the console of {self._machine} was closed before it showed {pattern.pattern!r}"
                raise self._noted(MachineEnded(what))
            await self._changed.wait()

    async def shows(self, pattern: str) -> bool:
        """Wait until the console has shown a match of a regular expression. Returns False if the console closes first.

        Searches all text that is kept, even if `expect` has consumed it.
        """
        compiled = re.compile(pattern, re.DOTALL)
        while not compiled.search(self.text):
            if self._ended:
                return False
            await self._changed.wait()
        return True

    def _noted(self, error: Timeout | MachineEnded) -> Timeout | MachineEnded:
        lines = self.last_lines(_SHOWN) or ["nothing"]
        error.add_note("\n".join(("the console's last lines:", *(f"    {line}" for line in lines))))
        return error

    def last_lines(self, count: int) -> list[str]:
        """Return the console's last lines, safe to print. One empty line replaces several."""
        lines = console_lines(self.text)
        return [line for line, last in zip(lines, ["", *lines], strict=False) if line or last][-count:]

    # The methods of a viewer (`Viewer` in console/hub.py).

    def show(self, data: bytes) -> None:
        """Append output."""
        text = self._held + self._decoder.decode(data)
        kept = text.rstrip("\r")
        self._held = text[len(kept) :]
        self._append(_LINE_END.sub("\n", kept))

    def finish(self) -> bool:
        """Note the end of the output. Returns True."""
        self._append(self._held + self._decoder.decode(b"", final=True))
        self._held, self._ended = "", True
        self._notify()
        return True

    @property
    def is_full(self) -> bool:
        """Always False: the oldest output is dropped instead."""
        return False

    def _append(self, text: str) -> None:
        self._text += text
        if (excess := len(self._text) - TEXT_MAX) > 0:
            self._text = self._text[excess:]
            self._position = max(0, self._position - excess)
        self._notify()

    def _notify(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
