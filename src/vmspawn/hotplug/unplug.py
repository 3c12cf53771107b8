# SPDX-License-Identifier: LGPL-2.1-or-later
"""Unplugs a device: requests that the guest release it, again and again, until it is removed."""

from __future__ import annotations

from collections.abc import Callable

from ..aio.waiting import first_of
from ..errors import QmpError
from ..qmp.monitor import Monitor
from ..qmp.run_state import RunState
from .attachment import Attachment, Removal
from .qemu_objects import device_ids

#: Seconds between requests to the guest: firmware loses early ones (docs/qemu.md, "Unplug"), and repeated ones are
#: harmless. The last interval is repeated.
RETRY_INTERVALS = (1.0, 2.0, 4.0, 8.0)


async def ask_until_gone(
    monitor: Monitor, run_state: RunState, attachment: Attachment, removal: Removal, on_request: Callable[[], None]
) -> None:
    """Request the device's removal until QEMU has no device of that id. `on_request` is called after each request.

    Raises Timeout or NotConnected.
    """
    while not attachment.gone.is_set():
        # A request before the guest has run for the first time has no effect until a reset (docs/qemu.md, "Unplug").
        await first_of(run_state.has_run, attachment.gone)
        removal.requests += 1
        try:
            await monitor.execute("device_del", {"id": attachment.device})
        except QmpError as error:
            if error.error_class == "DeviceNotFound":
                return
            # QEMU also refuses a request while an earlier one is pending or the guest is busy. The removal continues.
            removal.answer = error.description
        on_request()
        await attachment.wait_for_news(RETRY_INTERVALS[min(removal.requests, len(RETRY_INTERVALS)) - 1])
        if not attachment.gone.is_set() and attachment.device not in await device_ids(monitor):
            return
