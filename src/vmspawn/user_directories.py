# SPDX-License-Identifier: LGPL-2.1-or-later
"""Finds the user's directories by the XDG Base Directory Specification."""

from __future__ import annotations

import os


def user_directory(variable: str, below_home: str) -> str | None:
    """Return the directory that an environment variable names, or its default below the user's home directory.

    Returns None if the user has no home directory, neither in HOME nor in the password database. Relative paths are
    ignored, and so is a home directory that does not exist: the password database has /nonexistent for many users, and
    the directory would be made there.
    """
    if (named := os.environ.get(variable, "")).startswith("/"):
        return named
    home = os.environ.get("HOME") or _home_of_password_database()
    return os.path.join(home, below_home) if home.startswith("/") and os.path.isdir(home) else None


def _home_of_password_database() -> str:
    import pwd

    try:
        return pwd.getpwuid(os.geteuid()).pw_dir
    except KeyError:
        return ""
