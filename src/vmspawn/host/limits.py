# SPDX-License-Identifier: LGPL-2.1-or-later
"""Raises the limits of our process."""

from __future__ import annotations

import contextlib
import resource

#: Descriptors for all connections and sessions that we allow (`CONNECTIONS_MAX`, `SESSIONS`), and some more.
DESCRIPTORS = 4096


def allow_descriptors() -> None:
    """Raise the soft limit of descriptors to what this process and QEMU, which inherits the limit, may need.

    The soft limit is 1024 for the sake of select(2), which neither uses, and a user may have lowered it.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = DESCRIPTORS if hard == resource.RLIM_INFINITY else min(DESCRIPTORS, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
