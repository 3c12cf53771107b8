# SPDX-License-Identifier: LGPL-2.1-or-later
"""Launches a machine without blocking the event loop.

Probing QEMU, downloading packages and building the guest may take minutes. They run in a worker thread, which ends soon
after it is cancelled, and leaves nothing behind.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from ..aio.programs import CANCELLER, Canceller, check_cancelled
from ..boot.config import MachineConfig
from ..boot.launch import launch
from ..boot.started import Started
from ..machine.running import Running, run
from ..snapshots import warm
from ..snapshots.fork import fork

_T = TypeVar("_T")


async def start(config: MachineConfig) -> Running:
    """Launch a machine, and wait until it is up.

    Raises the errors of `launch` and `run`. Leaves nothing behind after an error, or when it is cancelled.
    """
    return await run(await _in_thread(partial(_launch_in_thread, config)))


async def start_copy(config: MachineConfig, snapshot: str, *, keep_disks: bool, new_identity: bool) -> Running:
    """Start a copy from a snapshot, and wait until it is up. Raises what `fork` and `run` raise, and leaves nothing
    behind then, nor when it is cancelled."""
    return await run(await _in_thread(partial(_fork_in_thread, config, snapshot, keep_disks, new_identity)))


async def _in_thread(launch_it: Callable[[Canceller], Started]) -> Started:
    canceller = Canceller()
    work = asyncio.create_task(asyncio.to_thread(launch_it, canceller))
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        canceller.cancel()
        await _until_done(work)
        if work.exception() is None:
            await asyncio.to_thread(work.result().give_up)
        raise


def _launch_in_thread(config: MachineConfig, canceller: Canceller) -> Started:
    CANCELLER.set(canceller)
    # `notice` is called before each step, so the work can be cancelled between two steps.
    begin = warm.start if config.warm else launch
    return begin(config, notice=lambda _: check_cancelled(), on_begin=check_cancelled)


def _fork_in_thread(
    config: MachineConfig, snapshot: str, keep_disks: bool, new_identity: bool, canceller: Canceller
) -> Started:
    CANCELLER.set(canceller)
    return fork(config, snapshot, keep_disks=keep_disks, new_identity=new_identity, on_begin=check_cancelled)


async def _until_done(work: asyncio.Task[_T]) -> None:
    """Wait for work that is about to end, even if this call is cancelled several times."""
    while not work.done():
        try:
            await asyncio.wait({work})
        except asyncio.CancelledError:
            continue
