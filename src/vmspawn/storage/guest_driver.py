# SPDX-License-Identifier: LGPL-2.1-or-later
"""Waits until the guest's driver has started to use a disk.

The evidence is the guest's first request to the disk: on each bus, Linux reads the partition table when the disk has
its node in /dev. QEMU knows the driver's status for virtio only. That status is set before the node exists, and asking
for it crashes QEMU 11.1 (docs/qemu.md, "Faults"). No event reports the first request, so the statistics are polled.
"""

from __future__ import annotations

from time import monotonic

from ..aio.waiting import first_of
from ..errors import ConfigNotSupported, Timeout
from . import buses, statistics
from .attached_disk import AttachedDisk
from .context import Context
from .disk import Disk

#: Seconds between two polls: the first interval, and the longest.
_INTERVAL = 0.02
_INTERVAL_MAX = 0.5


def check_can_tell(disk: Disk) -> None:
    """Raise ConfigNotSupported for an optical drive, which a guest reads only when it uses the medium."""
    if disk.bus in buses.TABLE and not buses.TABLE[disk.bus].is_writable:
        raise ConfigNotSupported(
            f"QEMU cannot tell whether the guest uses {disk.name}: a guest reads from bus {disk.bus} only when "
            "it uses the medium",
            hint="attach it without waiting, and wait in the guest for its path in /dev/disk/by-id",
        )


async def wait_taken(context: Context, attached: AttachedDisk, timeout: float) -> None:
    """Wait until the guest has made a request to the disk.

    Raises Timeout after `timeout` seconds; the disk stays attached. Raises NoSuchStorage if the disk is detached
    meanwhile, or what `Monitor.execute` raises.
    """
    deadline, interval = monotonic() + timeout, _INTERVAL
    while not await _has_requests(context, attached):
        left = deadline - monotonic()
        if left <= 0:
            raise Timeout(
                f"the guest has not used {attached.name} within {timeout:g} s; the disk is attached",
                hint="check that the guest is up and supports hot-plug and the bus; detach the disk if not",
            )
        await first_of(attached.gone, timeout=min(left, interval))
        if attached.gone.is_set() or attached.is_leaving:
            raise attached.vanished()
        interval = min(interval * 2, _INTERVAL_MAX)


async def _has_requests(context: Context, attached: AttachedDisk) -> bool:
    found = (await statistics.read(context, [attached])).get(attached.name)
    return found is not None and bool(found.reads or found.writes or found.flushes or found.failed)
