# SPDX-License-Identifier: LGPL-2.1-or-later
"""Finds programs in $PATH. Each start imports this module, so it imports very little."""

from __future__ import annotations

import os


def find_program(name: str) -> str | None:
    """Return the absolute path of a program, or None. A name with a slash is a path already."""
    folders = [""] if os.sep in name else os.environ.get("PATH", os.defpath).split(os.pathsep)
    for folder in folders:
        path = os.path.join(folder, name)
        if os.path.isfile(path) and os.access(path, os.X_OK):
            return os.path.abspath(path)
    return None
