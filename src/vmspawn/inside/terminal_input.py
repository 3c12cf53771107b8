# SPDX-License-Identifier: LGPL-2.1-or-later
"""Ends the input of a command that runs on a terminal.

A terminal has one stream for both directions. If the client shut down its input, QEMU would close the whole stream, and
the command's output would be lost. So the end is typed, as on a keyboard.
"""

from __future__ import annotations

#: The default end-of-file character (VEOF in termios(3)): Ctrl-D.
_END_OF_FILE = b"\x04"


def end_of_input(last: bytes) -> bytes:
    """Return the bytes to type at the end of the input. `last` is the last part of the input before.

    The character ends the file only at the beginning of a line; elsewhere it passes the unfinished line to the program.
    So it is typed twice after an unfinished line.
    """
    is_unfinished = bool(last) and not last.endswith((b"\n", b"\r", _END_OF_FILE))
    return _END_OF_FILE * 2 if is_unfinished else _END_OF_FILE
