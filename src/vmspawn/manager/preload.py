# SPDX-License-Identifier: LGPL-2.1-or-later
"""Imports the modules that a running machine may need later, before the manager reports that it is ready.

The package may be upgraded, moved or removed while the machine runs: no module can be imported then. Modules that only
a start or an adoption needs are left out, because they would cost a third of the manager's memory.
"""

from __future__ import annotations

import asyncio
from importlib import import_module

from .. import log
from ..control.server import ControlServer

#: Every module that is imported inside a function and may be needed while a machine runs. Each also imports
#: the modules that it needs. Slow imports come last, so that a client that waits for the control socket is answered
#: first.
MODULES = (
    "manager.report",
    "images.other_files",
    "images.qcow2",
    "images.vmdk",
    "images.vhdx",
    "host.varlink",
    "storage.refusals",
    "qmp.share.peer",
    "manager.tidying",
    "control.snapshots",
    "inside.commands",
    "inside.waiting",
    "control.execute",
    "qmp.share.multiplexer",
)

#: The number of turns in which the event loop accepts and receives a call.
_TURNS_OF_A_CALL = 3

#: Seconds that all calls together may delay the imports, and the report that the manager is ready.
_CALLS_TIMEOUT = 0.1


async def preload(server: ControlServer) -> None:
    """Import the modules, one at a time. Calls of clients are answered first."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + _CALLS_TIMEOUT
    for name in MODULES:
        for _ in range(_TURNS_OF_A_CALL):
            await asyncio.sleep(0)
        await server.answered(timeout=deadline - loop.time())
        try:
            import_module(f"vmspawn.{name}")
        except ImportError as error:
            # The package was changed at this moment. Each later use of the module reports that.
            log.debug(f"cannot import {name}: {error}")
            return
