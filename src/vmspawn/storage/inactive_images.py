# SPDX-License-Identifier: LGPL-2.1-or-later
"""Refuses to change images that QEMU has made inactive: QEMU 7.2 would abort (docs/qemu.md, "Faults")."""

from __future__ import annotations

from ..errors import NotSupported
from ..qmp.inactive import MIGRATION_STATES, is_inactive
from .context import Context


async def are_inactive(context: Context) -> bool:
    """Ask QEMU whether its images are inactive. Raises what `Monitor.execute` raises."""
    status = await context.run_state.ask()
    return status in MIGRATION_STATES and is_inactive(status, await context.monitor.execute("query-migrate"))


async def check(context: Context) -> None:
    """Raise NotSupported if the images are inactive, or what `Monitor.execute` raises."""
    if await are_inactive(context):
        status = context.run_state.status
        raise NotSupported(
            f"QEMU cannot change images while the guest is {status}: {MIGRATION_STATES[status]}",
            hint="wait until its state has arrived" if status == "inmigrate" else "resume the guest first",
        )
