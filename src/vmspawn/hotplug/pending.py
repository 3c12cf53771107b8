# SPDX-License-Identifier: LGPL-2.1-or-later
"""Explains why a removal has not completed."""

from __future__ import annotations

from ..qmp.run_state import RunState
from .attachment import Attachment


def why(attachment: Attachment, run_state: RunState) -> str:
    """Return the likely reason why the attachment still exists."""
    removal = attachment.removal
    if not attachment.has_device:
        answer = f": {removal.answer}" if removal and removal.answer else ""
        return f"{attachment.still_closing}{answer}"
    if not run_state.has_run.is_set():
        return f"the guest has not been started yet and cannot release {attachment.name}"
    if not run_state.is_running:
        return f"the guest is {run_state.status} and cannot release {attachment.name}"
    return attachment.not_released
