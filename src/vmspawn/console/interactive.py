# SPDX-License-Identifier: LGPL-2.1-or-later
"""Shows the guest's console on vmspawn's own terminal, and passes the terminal's input to the guest."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable
from typing import TYPE_CHECKING

from .hotkeys import Key
from .keyboard import Keyboard
from .terminal import Screen, Terminal, window_size
from .viewers import OutputViewer, output_failed

if TYPE_CHECKING:
    from .hub import Console


class Interactive:
    """Shows a console on one descriptor and reads input from another. The caller keeps both.

    Terminals are raw until `close`, which restores them even if the guest has changed their modes. `on_key` gets
    vmspawn's key sequences. `on_terminal_gone` is called when the input terminal hangs up. `on_resize` gets the
    window's rows and columns, at the start and after each `window_changed`. `report` prints a message.
    """

    def __init__(
        self,
        console: Console,
        source: int,
        target: int,
        *,
        on_key: Callable[[Key], None],
        on_terminal_gone: Callable[[], None],
        on_resize: Callable[[int, int], None],
        report: Callable[[str], None],
    ) -> None:
        self._target = target
        self._on_resize = on_resize
        self._terminals: list[tuple[Terminal, bool]] = []
        self._shared = _same_terminal(target, 2)
        self._screen = Screen()
        if os.isatty(source):
            self._terminals.append((Terminal(source), True))
        if os.isatty(target) and not _same_terminal(source, target):
            self._terminals.append((Terminal(target), False))
        self._is_suspended = True
        try:
            self.resume()
            self._viewer = OutputViewer(
                console, target, self._screen, on_failed=lambda error: report(output_failed(error))
            )
            console.attach(self._viewer)
            self._keyboard = Keyboard(
                console,
                source,
                terminal=os.isatty(source),
                on_key=on_key,
                on_gone=on_terminal_gone,
                on_overflow=lambda: report("the guest does not read its input; further input is dropped"),
            )
        except BaseException:
            self._restore()
            raise

    def write_line(self, line: str) -> None:
        """Show a message of vmspawn amid the guest's output, on a line of its own."""
        start = "" if self._screen.at_line_start else "\r\n"
        data = f"{start}{line}\r\n".encode()
        if self._shared and not self._is_suspended:
            self._viewer.show(data)
        else:
            with contextlib.suppress(OSError):
                os.write(2, data)

    def window_changed(self) -> None:
        """Read the window's size, and report it to `on_resize`."""
        if os.isatty(self._target):
            self._on_resize(*window_size(self._target))

    def suspend(self) -> None:
        """Restore the terminal until `resume`."""
        self._is_suspended = True
        self._restore()

    def resume(self) -> None:
        """Make the terminal raw. The kernel stops a background process here until it is in the foreground."""
        self._is_suspended = False
        for terminal, typed in self._terminals:
            terminal.raw(typed=typed)
        self.window_changed()

    def close(self) -> None:
        """Restore the terminal permanently. May be called again."""
        self._keyboard.close()
        if os.isatty(self._target) and (reset := self._screen.reset()):
            self._screen = Screen()
            self._viewer.write_last(reset)
        self._viewer.close()
        self._restore()

    def _restore(self) -> None:
        for terminal, _ in self._terminals:
            terminal.restore()


def _same_terminal(one: int, other: int) -> bool:
    first, second = os.fstat(one), os.fstat(other)
    return stat.S_ISCHR(first.st_mode) and os.isatty(one) and first.st_rdev == second.st_rdev
