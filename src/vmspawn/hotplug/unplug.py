# SPDX-License-Identifier: LGPL-2.1-or-later
"""Unplug a device: ask the guest to release it until it is gone."""

from __future__ import annotations

from collections.abc import Callable

from ..aio.waiting import first_of
from ..errors import QmpError
from ..qmp.monitor import Monitor
from ..qmp.run_state import RunState
from .attachment import Attachment, Removal
from .qemu_objects import device_ids

#: Seconds between requests to the guest: early ones are lost in firmware (docs/qemu.md, "Unplug"), later ones are
#: harmless. The last one is repeated for ever.
RETRY_INTERVALS = (1.0, 2.0, 4.0, 8.0)


async def ask_until_gone(
    monitor: Monitor, run_state: RunState, attachment: Attachment, removal: Removal, on_request: Callable[[], None]
) -> None:
    """Return once QEMU has no such device. `on_request` is called after each request.

    Raises Timeout or NotConnected.
    """
    while not attachment.gone.is_set():
        # A request before the guest has ever run would be stuck until a reset (docs/qemu.md, "Unplug").
        await first_of(run_state.has_run, attachment.gone)
        removal.requests += 1
        try:
            await monitor.execute("device_del", {"id": attachment.device})
        except QmpError as error:
            if error.error_class == "DeviceNotFound":
                return
            # That it was asked already, or that the guest is busy, is a state and no failure.
            removal.answer = error.description
        on_request()
        await attachment.wait_for_news(RETRY_INTERVALS[min(removal.requests, len(RETRY_INTERVALS)) - 1])
        if not attachment.gone.is_set() and attachment.device not in await device_ids(monitor):
            return
