# SPDX-License-Identifier: LGPL-2.1-or-later
"""Makes, lists and removes snapshots, and starts copies, with the types of `io.vmspawn.Machine`."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from functools import partial

from asyncvarlink.serviceerrors import InvalidParameter

from ..aio.sockets import peer_process
from ..aio.threads import run_cancellable
from ..host.runtime import check_name
from ..machine.running import Running
from ..snapshots import background, directory, listing, removal, save
from ..snapshots.names import free_name
from .connection import CALLER
from .forwards import to_forward
from .snapshot_types import FrozenDisk, ListedSnapshot, Progress, WantedForward

#: Seconds within which copies must start.
_FORK_TIMEOUT = 60.0


async def make(machine: Running, name: str, *, temporary: bool, detach_blocking: bool) -> AsyncIterator[Progress]:
    """Save a machine, and report the progress. If the client disconnects, the save is cancelled."""
    news: asyncio.Queue[Progress | None] = asyncio.Queue()

    def progress(done: int, total: int) -> None:
        news.put_nowait({"doneBytes": done, "totalBytes": total})

    work = save.save(machine, name, is_temporary=temporary, detach_blocking=detach_blocking, on_progress=progress)
    task = asyncio.create_task(work)
    task.add_done_callback(lambda _: news.put_nowait(None))
    try:
        while (found := await news.get()) is not None:
            yield found
        yield _last(await task)
    finally:
        if not task.done():
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


def _last(saved: save.Saved) -> Progress:
    state = saved.manifest.state
    size = state.total if state is not None else 0
    disks = [FrozenDisk(*each) for each in saved.disks]
    return {
        "doneBytes": size,
        "totalBytes": size,
        "snapshot": saved.manifest.full_name,
        "sizeBytes": size,
        "pauseUSec": int(saved.pause * 1e6),
        "disks": disks,
    }


def to_options(
    *,
    keep_disks: bool | None,
    new_identity: bool | None,
    console: str | None,
    log: str | None,
    forwards: list[WantedForward] | None,
    die_with_caller: bool | None,
) -> background.CopyOptions:
    """Return the options that a client asks for. Raises InvalidParameter."""
    if log is not None and not os.path.isabs(log):
        raise InvalidParameter(parameter="log")
    return background.CopyOptions(
        keep_disks=bool(keep_disks),
        new_identity=bool(new_identity),
        console=console or background.CONSOLES[0],
        console_log=log or "",
        forwards=tuple(to_forward(each.guestPort, each.port, each.address, each.protocol) for each in forwards or ()),
        parent=peer_process(CALLER.get())[0] if die_with_caller else 0,
    )


async def fork(machine: Running, snapshot: str, names: list[str], options: background.CopyOptions) -> list[str]:
    """Start copies of a machine's snapshot; returns their names.

    Raises UsageError, StartError, SnapshotExists, Timeout.
    """
    chosen = [check_name(each) for each in names] or [free_name(machine.name)]
    full_name = directory.find(machine.name, snapshot)
    await asyncio.to_thread(partial(background.start_copies, timeout=_FORK_TIMEOUT), full_name, chosen, options)
    return chosen


async def list_all(machine: Running) -> list[ListedSnapshot]:
    """Return the snapshots of a machine, the oldest first."""
    return [
        ListedSnapshot(each.name, int(each.created * 1e6), each.parent or None, each.size, each.disks, each.forks)
        for each in await asyncio.to_thread(listing.listed)
        if each.machine == machine.name
    ]


async def remove(machine: Running, name: str) -> None:
    """Remove a snapshot of a machine. Raises NoSuchSnapshot, SnapshotInUse, SystemFailure."""
    full_name = f"{machine.name}@{directory.check_name(name)}"
    await run_cancellable(partial(removal.remove, full_name))
