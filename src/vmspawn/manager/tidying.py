# SPDX-License-Identifier: LGPL-2.1-or-later
"""Removes overlays and snapshots that nothing needs after the end of a machine."""

from __future__ import annotations

from ..console.messages import Messages
from ..images import snapshot_files
from ..machine.running import Running
from ..snapshots import directory, merge


def tidy_disks(machine: Running, messages: Messages) -> None:
    """Remove unused snapshots that were made for copies, and merge overlays into images that no snapshot needs.

    Reports failures, and prints a notice if snapshots still need the machine's disks.
    """
    source = machine.fork.snapshot.partition("@")[0] if machine.fork is not None else machine.name
    failures = merge.after_end(machine.name, source)
    for error in failures:
        messages.report(str(error))
        messages.report(error.hint)
    current = f"{machine.name}@{directory.CURRENT}"
    if current in snapshot_files.names() and not failures:
        messages.notice(
            f"snapshots need the images of {machine.name}, so its newest data is in {current}; "
            f"to boot from it: vmspawn --fork={current}"
        )
