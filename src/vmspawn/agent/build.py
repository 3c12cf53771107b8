# SPDX-License-Identifier: LGPL-2.1-or-later
"""Finds the compiled agent. A wheel contains it; in a source tree it is compiled once, and kept in the cache.

vmspawn imports this module at each start, so the modules that compile are imported only when they are needed.
"""

from __future__ import annotations

import os

from ..cache import cache_directory
from ..errors import StartError, UsageError
from ..fingerprint import fingerprint_files

_FOLDER = os.path.dirname(os.path.abspath(__file__))

#: The files that a compiled agent depends on: its sources, and the compiler's options.
_INPUTS = ("agent.c", "kernel.h", "compiler.py")


def build(architecture: str, folder: str | None = None) -> str:
    """Return the path of the agent for an architecture. Compile it unless this version is in the directory `folder`.

    Without `folder`, return the agent that the wheel contains; if there is none, `folder` is a directory in the user's
    cache. Raises StartError.
    """
    packaged = os.path.join(_FOLDER, f"agent-{architecture}")
    if folder is None and os.path.exists(packaged):
        return packaged
    path = os.path.join(folder or _default_folder(), f"agent-{architecture}-{fingerprint()}")
    if not os.path.exists(path):
        from .compiler import compile_agent

        compile_agent(architecture, path)
    return path


def _default_folder() -> str:
    """Return the directory in the user's cache that keeps compiled agents. Raises StartError."""
    try:
        return os.path.join(cache_directory(), "agent")
    except UsageError as error:
        raise StartError(f"cannot compile the agent: {error}", hint=error.hint) from None


def fingerprint() -> str:
    """Return a short hash of the sources and of the compiler's options."""
    return fingerprint_files(os.path.join(_FOLDER, name) for name in _INPUTS)
