# SPDX-License-Identifier: LGPL-2.1-or-later
"""Finds the cache directory, for files that can be made again: the built-in guest, facts about QEMU, reports."""

from __future__ import annotations

import os

from .user_directories import user_directory


def cache_directory() -> str:
    """Return the absolute path of the cache directory, whether it exists or not.

    Raises UsageError for a user without a home.
    """
    if base := os.environ.get("VMSPAWN_CACHE_DIR"):
        return os.path.abspath(base)
    if (base := user_directory("XDG_CACHE_HOME", ".cache")) is None:
        # The modules that find the built-in guest load as little as they can.
        from .errors import UsageError

        raise UsageError("no cache directory: there is no home", hint="set VMSPAWN_CACHE_DIR to a folder of yours")
    return os.path.join(base, "vmspawn")
