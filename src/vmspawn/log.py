# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the manager does, step by step, for whoever looks for a fault: `vmspawn -v`, or VMSPAWN_LOG=debug.

Not the logging module, which would take as long to load as all else that a start needs.
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
    """Say more from now on."""
    global _enabled
    _enabled = True


def enabled() -> bool:
    """Whether more is said, for messages that are dear to make."""
    return _enabled


def debug(message: str) -> None:
    """Say what is being done, on standard error, with the seconds since the start."""
    if not _enabled:
        return
    # Nobody may read it any more.
    with contextlib.suppress(OSError):
        print(f"vmspawn[{os.getpid()}] {time.monotonic() - _start:8.3f} {message}", file=sys.stderr, flush=True)
