# SPDX-License-Identifier: LGPL-2.1-or-later
"""Explain why a removal has not completed."""

from __future__ import annotations

from ..qmp.run_state import RunState
from .attachment import Attachment


def why(attachment: Attachment, run_state: RunState) -> str:
    """Why the attachment is still there, as far as can be told."""
    removal = attachment.removal
    if not attachment.has_device:
        answer = f": {removal.answer}" if removal and removal.answer else ""
        return f"{attachment.still_closing}{answer}"
    if not run_state.has_run.is_set():
        return f"{attachment.name} stays until the guest runs: it has not been started yet"
    if not run_state.is_running:
        return f"{attachment.name} stays while the guest is {run_state.status}: it cannot let go"
    return attachment.not_released
