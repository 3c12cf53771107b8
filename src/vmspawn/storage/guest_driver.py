# SPDX-License-Identifier: LGPL-2.1-or-later
"""Wait until the guest's driver has taken a disk.

The evidence is the first request that the guest makes: Linux reads the partition table once the disk has its node in
/dev. It holds for each bus. QEMU has a driver's status for virtio alone, which comes before the node, and asking for it
ends QEMU 11.1 where there is no driver yet (docs/qemu.md, "Faults"). No event tells of either, so QEMU is asked.
"""

from __future__ import annotations

from time import monotonic

from ..aio.waiting import first_of
from ..errors import ConfigNotSupported, Timeout
from . import buses, statistics
from .attached_disk import AttachedDisk
from .context import Context
from .disk import Disk

#: Seconds between two questions: the first, and the longest.
_INTERVAL = 0.02
_INTERVAL_MAX = 0.5


def check_can_tell(disk: Disk) -> None:
    """Raise ConfigNotSupported for an optical drive, from which a guest reads only when it is used."""
    if disk.bus in buses.TABLE and not buses.TABLE[disk.bus].writable:
        raise ConfigNotSupported(
            f"QEMU cannot tell whether the guest has taken {disk.name}: a guest reads from bus {disk.bus} only when "
            "it uses the medium",
            hint="attach it without waiting, and wait in the guest for its path in /dev/disk/by-id",
        )


async def wait_taken(context: Context, attached: AttachedDisk, timeout: float) -> None:
    """Wait until the guest has made a request to the disk.

    Raises Timeout if it has made none after `timeout` seconds; the disk stays attached. Raises NoSuchStorage if the
    disk goes meanwhile, or what `Monitor.execute` raises.
    """
    deadline, interval = monotonic() + timeout, _INTERVAL
    while not await _has_requests(context, attached):
        left = deadline - monotonic()
        if left <= 0:
            raise Timeout(
                f"the guest has not taken {attached.name} within {timeout:g} s; the disk is attached",
                hint="is the guest up, and does it have a driver for the bus, and hot-plug? the disk can be detached",
            )
        await first_of(attached.gone, timeout=min(left, interval))
        if attached.gone.is_set() or attached.is_leaving:
            raise attached.vanished()
        interval = min(interval * 2, _INTERVAL_MAX)


async def _has_requests(context: Context, attached: AttachedDisk) -> bool:
    found = (await statistics.read(context, [attached])).get(attached.name)
    return found is not None and bool(found.reads or found.writes or found.flushes or found.failed)
