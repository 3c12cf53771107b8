# SPDX-License-Identifier: LGPL-2.1-or-later
"""Raises the limits of this process."""

from __future__ import annotations

import contextlib
import resource

#: Enough descriptors for all connections and sessions (`CONNECTIONS_MAX`, `SESSIONS`).
DESCRIPTORS = 4096


def allow_descriptors() -> None:
    """Raise the soft limit of descriptors, for this process and for QEMU, which inherits it.

    The default of 1024 protects programs that pass descriptors to select(2). Neither QEMU nor vmspawn does.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = DESCRIPTORS if hard == resource.RLIM_INFINITY else min(DESCRIPTORS, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
