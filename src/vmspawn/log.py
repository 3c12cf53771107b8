# SPDX-License-Identifier: LGPL-2.1-or-later
"""Logs the manager's steps on standard error, with VMSPAWN_LOG=debug.

The logging module is not used, because importing it takes as long as all other imports of a start.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time

#: The environment variable that enables the log, and the value that enables it.
VARIABLE = "VMSPAWN_LOG"
_DEBUG = "debug"

_enabled = os.environ.get(VARIABLE, "").lower() == _DEBUG
_start = time.monotonic()


def enabled() -> bool:
    """Return whether the log is enabled, for callers whose messages are expensive to make."""
    return _enabled


def debug(message: str) -> None:
    """Log a message on standard error, with the seconds since the start."""
    if not _enabled:
        return
    # The reader of standard error may have closed it.
    with contextlib.suppress(OSError):
        print(f"vmspawn[{os.getpid()}] {time.monotonic() - _start:8.3f} {message}", file=sys.stderr, flush=True)
