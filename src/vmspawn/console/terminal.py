# SPDX-License-Identifier: LGPL-2.1-or-later
"""Makes a terminal raw for the guest, and restores its settings."""

from __future__ import annotations

import fcntl
import os
import termios
from typing import Any

# Indices into the list that termios.tcgetattr returns.
_IFLAG, _OFLAG, _CFLAG, _LFLAG, _CC = 0, 1, 2, 3, 6

#: Resets the modes that a guest may have set and that a shell does not reset: ends an unfinished control string,
#: selects the default character set, resets colours, cursor, margins, keypad, mouse and focus reports, bracketed paste
#: and line wrapping. The sequences are those of ECMA-48 and xterm; terminals ignore unknown ones.
_RESET = b"\x1b\\\x0f\x1b(B\x1b[!p\x1b[0m\x1b[?1000;1002;1003;1004;1006;2004l\x1b[?7h\x1b[?25h"

# The alternate screen is left only if the guest entered it, because leaving it moves the cursor.
_ENTER_ALTERNATE = (b"\x1b[?1049h", b"\x1b[?1047h", b"\x1b[?47h")
_LEAVE_ALTERNATE = (b"\x1b[?1049l", b"\x1b[?1047l", b"\x1b[?47l")
_LONGEST = max(map(len, _ENTER_ALTERNATE))


class Screen:
    """Tracks a terminal's output, to know how to reset the terminal."""

    def __init__(self) -> None:
        self._tail = b""
        self._is_alternate = False
        self._is_shown = False

    @property
    def at_line_start(self) -> bool:
        """True if the output so far ends with a complete line."""
        return not self._tail or self._tail.endswith(b"\n")

    def show(self, data: bytes) -> None:
        """Track output that the terminal shows."""
        seen = self._tail + data
        self._is_shown |= bool(data)
        if b"\x1b[?" in seen:
            entered = max(seen.rfind(each) for each in _ENTER_ALTERNATE)
            left = max(seen.rfind(each) for each in _LEAVE_ALTERNATE)
            if entered != left:
                self._is_alternate = entered > left
        self._tail = seen[-_LONGEST:]

    def reset(self) -> bytes:
        """Return the control sequences that reset the modes which the output may have set."""
        if not self._is_shown:
            return b""
        leave = _LEAVE_ALTERNATE[0] if self._is_alternate else b""
        return leave + _RESET + (b"" if self.at_line_start and not self._is_alternate else b"\r\n")


class Terminal:
    """One terminal's settings. The caller keeps the descriptor."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._saved: list[Any] = termios.tcgetattr(fd)
        # A killed QEMU that used this terminal may leave it non-blocking.
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
        """Restore the settings without draining output, which would never end on a stopped terminal.

        Does nothing if the terminal has hung up.
        """
        try:
            fcntl.fcntl(self._fd, fcntl.F_SETFL, self._flags)
            termios.tcsetattr(self._fd, termios.TCSANOW, self._saved)
        except (OSError, termios.error):
            pass


def window_size(fd: int) -> tuple[int, int]:
    """Return a terminal's rows and columns, or zeros if they are unknown."""
    try:
        size = os.get_terminal_size(fd)
    except OSError:
        return 0, 0
    return size.lines, size.columns


def is_foreground(fd: int) -> bool:
    """Return whether `fd` is a terminal, and this process is in its foreground process group."""
    try:
        return os.isatty(fd) and os.tcgetpgrp(fd) == os.getpgrp()
    except OSError:
        # tcgetpgrp(3) fails if this is not the controlling terminal. Other terminals do not stop background processes.
        return os.isatty(fd)
