# SPDX-License-Identifier: LGPL-2.1-or-later
"""Imports asyncio without OpenSSL, which a manager never uses.

OpenSSL takes a sixth of a manager's memory. asyncio supports a Python that was built without it.
"""

from __future__ import annotations

import sys
from collections.abc import MutableMapping
from typing import cast


def import_asyncio() -> None:
    """Import asyncio as in a Python without ssl. Later imports of ssl work."""
    modules = cast(MutableMapping[str, object], sys.modules)
    is_loaded = "ssl" in modules
    # The import system raises ModuleNotFoundError for a module that is None.
    modules.setdefault("ssl", None)
    try:
        import asyncio  # noqa: F401
    finally:
        if not is_loaded:
            del modules["ssl"]
