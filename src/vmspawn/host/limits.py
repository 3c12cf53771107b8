# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the kernel lets our process have."""

from __future__ import annotations

import contextlib
import resource

#: Descriptors for all connections and sessions that we allow (`CONNECTIONS_MAX`, `SESSIONS`), and some to spare.
DESCRIPTORS = 4096


def allow_descriptors() -> None:
    """Let this process have as many descriptors as its own limits promise, if its hard limit allows: the soft one is
    1024 for the sake of select(2), which nothing here uses."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = DESCRIPTORS if hard == resource.RLIM_INFINITY else min(DESCRIPTORS, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
