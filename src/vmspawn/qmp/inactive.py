# SPDX-License-Identifier: LGPL-2.1-or-later
"""Detects whether QEMU's images are inactive, which means that another QEMU may use them.

Images are inactive before an incoming state has arrived, and from the end of a save until `cont`, even across resets.
QEMU 7.2 does not report whether a node is inactive.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: Run states in which images may be inactive, with the reason.
MIGRATION_STATES = {
    "inmigrate": "its state has not arrived yet",
    "postmigrate": "its state was migrated or saved",
    "prelaunch": "its state was migrated or saved, and it was reset since",
}


def is_inactive(status: str, migration: Mapping[str, Any]) -> bool:
    """Return whether images are inactive, judged by the results of query-status and query-migrate.

    Also returns True for a guest that ran after a save, and was stopped and reset.
    """
    if status == "prelaunch":
        return migration.get("status") == "completed"
    return status in MIGRATION_STATES
