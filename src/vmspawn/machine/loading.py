# SPDX-License-Identifier: LGPL-2.1-or-later
"""Loads the state of a snapshot into QEMU, and makes QEMU continue after an interrupted save."""

from __future__ import annotations

import asyncio
import errno

from ..boot.started import Incoming
from ..boot.state import SavedLoading, SavedSaving
from ..errors import NotConnected, SystemFailure, Timeout
from ..qmp.events import EventStream
from ..qmp.monitor import Command, Monitor

#: The capability of QEMU to leave out memory that is in a shared file.
IGNORE_SHARED = "x-ignore-shared"

#: Seconds that QEMU may take to load a state.
_TIMEOUT = 600.0

#: Seconds that QEMU may take to end a save that was cancelled.
_CANCEL_TIMEOUT = 30.0

#: Seconds between two queries of the run state.
_STATE_INTERVAL = 0.01

#: The states of a migration that is under way, and the states of one that has ended.
UNDER_WAY = ("setup", "active", "device", "pre-switchover", "cancelling")
_ENDS = ("completed", "failed", "cancelled")


async def load(monitor: Monitor, incoming: Incoming) -> None:
    """Load the state, and resume the guest if it was running when it was saved.

    Raises NotConnected if QEMU ends, as it does if the state does not fit its devices; SystemFailure, QmpError,
    Timeout.
    """
    await set_up(monitor, has_ram_file=incoming.has_ram_file)
    with monitor.events() as events:
        await monitor.execute("migrate-incoming", {"uri": incoming.uri})
        await _until_loaded(events)
    await _forget_ram_file(monitor, has_ram_file=incoming.has_ram_file)
    if incoming.was_running:
        await monitor.execute("cont")


async def _until_loaded(events: EventStream) -> None:
    try:
        async with asyncio.timeout(_TIMEOUT):
            status = await until_ended(events, "loaded its state")
    except TimeoutError:
        raise Timeout(f"QEMU has not loaded its state within {_TIMEOUT:g} s") from None
    if status != "completed":
        raise SystemFailure("QEMU could not load its state", errno.EIO)


async def _forget_ram_file(monitor: Monitor, *, has_ram_file: bool) -> None:
    """Make later saves include all memory, which the file no longer backs."""
    if has_ram_file:
        capabilities = [{"capability": IGNORE_SHARED, "state": False}]
        await monitor.execute("migrate-set-capabilities", {"capabilities": capabilities})


async def end_loading(monitor: Monitor, loading: SavedLoading) -> None:
    """Finish a load whose manager died, and resume the guest if it was running. Raises what `load` raises."""
    with monitor.events() as events:
        status = (await monitor.execute("query-migrate")).get("status", "none")
        if status == "none":
            incoming = Incoming(loading.uri, loading.was_running, has_ram_file=loading.has_ram_file)
            return await load(monitor, incoming)
        if status in UNDER_WAY:
            await _until_loaded(events)
    await _forget_ram_file(monitor, has_ram_file=loading.has_ram_file)
    if loading.was_running and (await monitor.execute("query-status"))["status"] != "running":
        await monitor.execute("cont")
    return None


async def end_saving(monitor: Monitor, saving: SavedSaving) -> str:
    """End a save whose manager died, and resume the guest if it was running. Returns a message for the user."""
    await cancel(monitor)
    status = (await monitor.execute("query-status"))["status"]
    if saving.was_running and status != "running":
        await monitor.execute("cont")
    elif status == "postmigrate":
        await monitor.execute_all([Command("cont"), Command("stop")])
    return "an unfinished snapshot was cancelled; the machine continues"


async def cancel(monitor: Monitor) -> None:
    """Cancel a save, and wait until QEMU can resume the guest; returns at once if no save is under way.

    Raises what `Monitor.execute` raises, or Timeout.
    """
    try:
        async with asyncio.timeout(_CANCEL_TIMEOUT):
            with monitor.events() as events:
                if (await monitor.execute("query-migrate")).get("status") in UNDER_WAY:
                    await monitor.execute("migrate_cancel")
                    await until_ended(events, "saved its state")
            # QEMU refuses `cont` in the state finish-migrate, and leaves it some time after the migration's last event.
            while await _is_finishing(monitor):  # noqa: ASYNC110 - no event reports it
                await asyncio.sleep(_STATE_INTERVAL)
    except TimeoutError:
        raise Timeout(f"QEMU has not ended its migration within {_CANCEL_TIMEOUT:g} s") from None


async def _is_finishing(monitor: Monitor) -> bool:
    return bool((await monitor.execute("query-status"))["status"] == "finish-migrate")


async def set_up(monitor: Monitor, *, has_ram_file: bool) -> None:
    """Make QEMU report the states of a migration, and leave out memory that is in a file.

    Raises what `Monitor.execute` raises.
    """
    capabilities = [{"capability": "events", "state": True}]
    if has_ram_file:
        capabilities.append({"capability": IGNORE_SHARED, "state": True})
    await monitor.execute("migrate-set-capabilities", {"capabilities": capabilities})


async def until_ended(events: EventStream, doing: str) -> str:
    """Wait for the end of a migration, and return its state.

    `doing` describes QEMU's work in an error. Raises NotConnected if QEMU ends.
    """
    async for event in events:
        if event.name == "MIGRATION" and (status := str((event.data or {}).get("status"))) in _ENDS:
            return status
    raise NotConnected(f"QEMU ended while it {doing}")
