# SPDX-License-Identifier: LGPL-2.1-or-later
"""Launches a machine without blocking the event loop.

Probing QEMU, downloading packages and building the guest may take minutes. They run in a worker thread, which ends soon
after it is cancelled, and leaves nothing behind.
"""

from __future__ import annotations

from functools import partial

from ..aio.programs import check_cancelled
from ..aio.threads import run_cancellable
from ..boot.config import MachineConfig
from ..boot.launch import launch
from ..boot.started import Started
from ..machine.running import Running, run
from ..snapshots import warm
from ..snapshots.fork import fork


async def start(config: MachineConfig) -> Running:
    """Launch a machine, and wait until it is up.

    Raises the errors of `launch` and `run`. Leaves nothing behind after an error, or when it is cancelled.
    """
    # The work can be cancelled while it waits for a program, when it has a notice, and before the first step that has
    # to be undone (`on_begin`).
    begin = warm.start if config.warm else launch
    launch_it = partial(begin, config, notice=lambda _: check_cancelled(), on_begin=check_cancelled)
    return await run(await run_cancellable(launch_it, undo=Started.give_up))


async def start_copy(config: MachineConfig, snapshot: str, *, keep_disks: bool, new_identity: bool) -> Running:
    """Start a copy from a snapshot, and wait until it is up.

    Raises what `fork` and `run` raise. Leaves nothing behind after an error, or when it is cancelled.
    """
    start_it = partial(
        fork, config, snapshot, keep_disks=keep_disks, new_identity=new_identity, on_begin=check_cancelled
    )
    return await run(await run_cancellable(start_it, undo=Started.give_up))
