# SPDX-License-Identifier: LGPL-2.1-or-later
"""Makes a terminal raw for the guest, and restores it afterwards."""

from __future__ import annotations

import fcntl
import os
import termios
from typing import Any

# Indices of what tcgetattr(3) returns in Python.
_IFLAG, _OFLAG, _CFLAG, _LFLAG, _CC = 0, 1, 2, 3, 6

#: Switches off the modes that a guest may have switched on, and that a shell does not switch off: ends an unfinished
#: control string, selects the usual character set, resets colours, cursor, margins and keypad, mouse and focus reports,
#: bracketed paste and line wrapping. ECMA-48 and xterm's control sequences; terminals ignore unknown ones.
_RESET = b"\x1b\\\x0f\x1b(B\x1b[!p\x1b[0m\x1b[?1000;1002;1003;1004;1006;2004l\x1b[?7h\x1b[?25h"

# The alternate screen is left only if it was entered: leaving it moves the cursor.
_ENTER_ALTERNATE = (b"\x1b[?1049h", b"\x1b[?1047h", b"\x1b[?47h")
_LEAVE_ALTERNATE = (b"\x1b[?1049l", b"\x1b[?1047l", b"\x1b[?47l")
_LONGEST = max(map(len, _ENTER_ALTERNATE))


class Screen:
    """Follows the output of a terminal, to know how to reset it."""

    def __init__(self) -> None:
        self._tail = b""
        self._alternate = False
        self._shown = False

    @property
    def at_line_start(self) -> bool:
        """Whether the output has ended with a complete line."""
        return not self._tail or self._tail.endswith(b"\n")

    def show(self, data: bytes) -> None:
        """Follow output that is shown."""
        seen = self._tail + data
        self._shown |= bool(data)
        if b"\x1b[?" in seen:
            entered = max(seen.rfind(each) for each in _ENTER_ALTERNATE)
            left = max(seen.rfind(each) for each in _LEAVE_ALTERNATE)
            if entered != left:
                self._alternate = entered > left
        self._tail = seen[-_LONGEST:]

    def reset(self) -> bytes:
        """Return the control sequences that undo what the output may have switched on."""
        if not self._shown:
            return b""
        leave = _LEAVE_ALTERNATE[0] if self._alternate else b""
        return leave + _RESET + (b"" if self.at_line_start and not self._alternate else b"\r\n")


class Terminal:
    """One terminal's settings. The descriptor stays the caller's."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._saved: list[Any] = termios.tcgetattr(fd)
        # QEMU, if it gets this terminal, may leave it non-blocking when it is killed.
        self._flags = fcntl.fcntl(fd, fcntl.F_GETFL)

    def raw(self, *, typed: bool) -> None:
        """Pass output unchanged, and input as well if `typed` (termios(3), cfmakeraw)."""
        attributes = termios.tcgetattr(self._fd)
        attributes[_OFLAG] &= ~termios.OPOST
        if typed:
            attributes[_IFLAG] &= ~(
                termios.IGNBRK | termios.BRKINT | termios.PARMRK | termios.ISTRIP | termios.INLCR | termios.IGNCR
            )
            attributes[_IFLAG] &= ~(termios.ICRNL | termios.IXON | termios.IXOFF)
            attributes[_LFLAG] &= ~(termios.ECHO | termios.ECHONL | termios.ICANON | termios.ISIG | termios.IEXTEN)
            attributes[_CFLAG] = attributes[_CFLAG] & ~(termios.CSIZE | termios.PARENB) | termios.CS8
            attributes[_CC][termios.VMIN], attributes[_CC][termios.VTIME] = 1, 0
        termios.tcsetattr(self._fd, termios.TCSANOW, attributes)

    def restore(self) -> None:
        """Restore the settings, without waiting for output: a stopped terminal would never finish it.

        Does nothing if the terminal is gone.
        """
        try:
            fcntl.fcntl(self._fd, fcntl.F_SETFL, self._flags)
            termios.tcsetattr(self._fd, termios.TCSANOW, self._saved)
        except (OSError, termios.error):
            pass


def window_size(fd: int) -> tuple[int, int]:
    """Return a terminal's rows and columns, zeros if they are not known."""
    try:
        size = os.get_terminal_size(fd)
    except OSError:
        return 0, 0
    return size.lines, size.columns


def is_foreground(fd: int) -> bool:
    """Whether this is a terminal, and we are in its foreground process group."""
    try:
        return os.isatty(fd) and os.tcgetpgrp(fd) == os.getpgrp()
    except OSError:
        # A terminal that is not our controlling terminal does not stop background processes.
        return os.isatty(fd)
