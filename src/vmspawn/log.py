# SPDX-License-Identifier: LGPL-2.1-or-later
"""Logs the steps of the manager on standard error, with VMSPAWN_LOG=debug.

It does not use the logging module, which takes as long to load as all other modules of a start.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time

#: The environment variable that turns it on, and its value.
VARIABLE = "VMSPAWN_LOG"
_DEBUG = "debug"

_enabled = os.environ.get(VARIABLE, "").lower() == _DEBUG
_start = time.monotonic()


def enable() -> None:
    """Log from now on."""
    global _enabled
    _enabled = True


def enabled() -> bool:
    """Whether debug messages are logged, for callers whose messages are expensive to make."""
    return _enabled


def debug(message: str) -> None:
    """Log a message on standard error, with the seconds since the start."""
    if not _enabled:
        return
    # The reader may be gone.
    with contextlib.suppress(OSError):
        print(f"vmspawn[{os.getpid()}] {time.monotonic() - _start:8.3f} {message}", file=sys.stderr, flush=True)
