# SPDX-License-Identifier: LGPL-2.1-or-later
"""Makes QEMU write its whole state to an open file.

QEMU accepts the migration URI `file:` since version 8.2. Later versions refuse regular files for the URI `fd:`. `file:`
takes a descriptor set, whose descriptor must be open for writing only; `fd:` takes a descriptor of `getfd`, or an
inherited one by its number.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable

from ..boot.incoming import STATE_FDSET
from ..errors import QmpError, SystemFailure
from ..machine.loading import IGNORE_SHARED, cancel, set_up, until_ended
from ..qmp.events import EventStream
from ..qmp.monitor import Command, Monitor

#: The limit in bytes per second. QEMU's default is lower.
_BANDWIDTH = 1 << 50

_NAME = "vmspawn-state"

#: Removes the descriptor set that `save` makes.
REMOVE_FDSET = Command("remove-fd", {"fdset-id": STATE_FDSET})

#: Seconds between two reports of the progress.
_INTERVAL = 0.2


async def save(
    monitor: Monitor, fd: int, on_progress: Callable[[int, int], None], *, has_ram_file: bool = False
) -> str:
    """Save the state of a stopped QEMU to a descriptor that is open only for writing; returns the URI's scheme.

    `on_progress` is called with the number of bytes that are written, and with the total. Memory that is in a file is
    not part of the state.

    Raises QmpError, SystemFailure if QEMU fails; `forget` must follow if this call is interrupted.
    """
    await set_up(monitor, has_ram_file=has_ram_file)
    await monitor.execute("migrate-set-parameters", {"max-bandwidth": _BANDWIDTH})
    scheme, events = await _begin(monitor, fd)
    with events:
        ended = asyncio.create_task(until_ended(events, "saved its state"))
        try:
            while not ended.done():
                await asyncio.wait({ended}, timeout=_INTERVAL)
                if not ended.done():
                    await _report(monitor, on_progress)
        finally:
            ended.cancel()
        status = await ended
    if status != "completed":
        raise SystemFailure(await _why(monitor, status), errno.EIO)
    return scheme


async def _begin(monitor: Monitor, fd: int) -> tuple[str, EventStream]:
    """Begin the save. Returns the URI's scheme, and the events from then on."""
    await monitor.execute("add-fd", {"fdset-id": STATE_FDSET}, fds=(fd,))
    try:
        return "file", await _migrate(monitor, f"file:/dev/fdset/{STATE_FDSET}")
    except QmpError:
        # This QEMU has no `file:`.
        await monitor.execute(REMOVE_FDSET.name, REMOVE_FDSET.arguments)
    await monitor.execute("getfd", {"fdname": _NAME}, fds=(fd,))
    return "fd", await _migrate(monitor, f"fd:{_NAME}")


async def _migrate(monitor: Monitor, uri: str) -> EventStream:
    events = monitor.events()
    try:
        await monitor.execute("migrate", {"uri": uri})
    except BaseException:
        events.close()
        raise
    return events


async def _report(monitor: Monitor, on_progress: Callable[[int, int], None]) -> None:
    ram = (await monitor.execute("query-migrate")).get("ram")
    if ram:
        on_progress(int(ram["total"]) - int(ram["remaining"]), int(ram["total"]))


async def _why(monitor: Monitor, status: str) -> str:
    reason = (await monitor.execute("query-migrate")).get("error-desc")
    return f"QEMU could not save its state ({reason or status})"


async def forget(monitor: Monitor) -> None:
    """Cancel a save that is under way, and close its descriptor in QEMU. Raises NotConnected, Timeout.

    `REMOVE_FDSET` must follow when the guest runs.
    """
    await cancel(monitor)
    # A later migration by a QMP client includes all memory again. An error means that the descriptor or the capability
    # is missing.
    capabilities = [{"capability": IGNORE_SHARED, "state": False}]
    await monitor.execute_all(
        [
            Command("closefd", {"fdname": _NAME}),
            Command("migrate-set-capabilities", {"capabilities": capabilities}),
        ]
    )
