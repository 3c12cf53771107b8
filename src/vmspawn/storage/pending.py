# SPDX-License-Identifier: LGPL-2.1-or-later
"""Why a removal has not completed, for people."""

from __future__ import annotations

from ..qmp.run_state import RunState
from .attached_disk import AttachedDisk

HINT = (
    "the removal goes on and completes when the guest lets go; repeat the command to wait for it, or take the image "
    "away by --force"
)
STORAGE_HINT = "the storage that the image is on may hang; once it answers, this goes on by itself"


def why(attachment: AttachedDisk, run_state: RunState) -> str:
    """Why the disk is still there, as far as can be told."""
    removal = attachment.removal
    name = attachment.name
    if "device" not in attachment.done:
        answer = f": {removal.answer}" if removal and removal.answer else ""
        return f"QEMU still closes the image of {name}{answer}"
    if not run_state.has_run.is_set():
        return f"{name} stays until the guest runs: it has not been started yet"
    if not run_state.is_running:
        return f"{name} stays while the guest is {run_state.status}: it cannot let go"
    if attachment.disk.bus == "nvme" and removal and removal.requests > 2:
        return f"the guest has not let go of {name}; one that uses an NVMe disk may never do so"
    return f"the guest has not let go of {name}; it may still be booting, or not know ACPI hot-plug"
