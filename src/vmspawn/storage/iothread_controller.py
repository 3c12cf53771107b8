# SPDX-License-Identifier: LGPL-2.1-or-later
"""The SCSI controller with an I/O thread: plugged in for the first disk that wants one, and kept for the next."""

from __future__ import annotations

from ..errors import QmpError
from ..hotplug import places
from ..hotplug.places import Pool
from .context import Context
from .qemu_objects import Part

#: The id of its thread.
CONTROLLER_THREAD = "scsi-thread"


async def threaded_scsi(context: Context) -> Pool:
    """The controller's targets. The first call takes a port for it; raises NoFreePort or QmpError, and leaves nothing
    then."""
    async with context.threading_scsi:
        if context.threaded_scsi is None or context.threaded_place is None:
            await _plug_in(context)
            context.threaded_scsi = context.threaded_scsi or places.scsi_pool(places.THREADED_SCSI_CONTROLLER)
        return context.threaded_scsi


async def _plug_in(context: Context) -> None:
    place = context.layout.pci.take()
    context.threaded_place = place
    context.journal()
    device = {
        "driver": "virtio-scsi-pci",
        "id": places.THREADED_SCSI_CONTROLLER,
        "iothread": CONTROLLER_THREAD,
        **place.properties(),
    }
    thread = {"qom-type": "iothread", "id": CONTROLLER_THREAD}
    try:
        await context.monitor.execute("object-add", thread)
        await context.monitor.execute("device_add", device)
    except QmpError:
        await context.remove(Part("object", CONTROLLER_THREAD))
        context.layout.pci.release(place)
        context.threaded_place = None
        raise
