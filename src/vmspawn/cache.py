# SPDX-License-Identifier: LGPL-2.1-or-later
"""Finds the cache directory, whose files may be deleted: the built-in guest, facts about QEMU, bug reports."""

from __future__ import annotations

import os

from .user_directories import user_directory


def cache_directory() -> str:
    """Return the absolute path of the cache directory, whether it exists or not.

    Raises UsageError for a user without a home directory.
    """
    if base := os.environ.get("VMSPAWN_CACHE_DIR"):
        return os.path.abspath(base)
    if (base := user_directory("XDG_CACHE_HOME", ".cache")) is None:
        # Each start imports this module, so it imports very little.
        from .errors import UsageError

        raise UsageError(
            "there is no cache directory, because the user has no home directory",
            hint="set VMSPAWN_CACHE_DIR to a directory",
        )
    return os.path.join(base, "vmspawn")
