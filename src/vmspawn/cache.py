# SPDX-License-Identifier: LGPL-2.1-or-later
"""The cache directory, for what can be made again: the built-in guest, facts about QEMU binaries, reports."""

from __future__ import annotations

import os


def cache_directory() -> str:
    """Return the absolute path of the cache directory, whether it exists or not."""
    base = os.environ.get("VMSPAWN_CACHE_DIR")
    if not base:
        home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
        base = os.path.join(home, "vmspawn")
    return os.path.abspath(base)
