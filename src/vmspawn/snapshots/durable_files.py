# SPDX-License-Identifier: LGPL-2.1-or-later
"""Writes files that are complete or absent after a crash of the program or of the host."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable


def write_file(path: str, content: bytes) -> None:
    """Make a file, and write it to the disk. Raises OSError."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def replace_file(path: str, make: Callable[[str], object]) -> None:
    """Replace a file by the file that `make` makes at a path. If that fails, the old file stays. Raises OSError."""
    new = path + ".new"
    # A program that was killed may have left this file.
    _discard(new)
    try:
        make(new)
        os.rename(new, path)
    finally:
        # If both are links to one file, rename(2) does nothing and leaves both.
        _discard(new)


def _discard(path: str) -> None:
    with contextlib.suppress(OSError):
        os.unlink(path)
