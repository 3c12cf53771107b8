# SPDX-License-Identifier: LGPL-2.1-or-later
"""Finds the user's own directories, as the XDG Base Directory Specification describes them."""

from __future__ import annotations

import os


def user_directory(variable: str, below_home: str) -> str | None:
    """Return the directory that an environment variable names, or else the one below the user's home.

    None if the user has no home: neither a HOME nor an entry in the password database. Relative paths are ignored.
    """
    if (named := os.environ.get(variable, "")).startswith("/"):
        return named
    home = os.environ.get("HOME") or _home_of_password_database()
    return os.path.join(home, below_home) if home.startswith("/") else None


def _home_of_password_database() -> str:
    import pwd

    try:
        return pwd.getpwuid(os.geteuid()).pw_dir
    except KeyError:
        return ""
