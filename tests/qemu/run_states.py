# SPDX-License-Identifier: LGPL-2.1-or-later
"""Brings machines without an operating system into QEMU's run states."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path

from tests.bootsector import (
    ACPI_CONTROL,
    AT_ONCE,
    IB700,
    PANICKED,
    PVPANIC,
    SOFT_OFF,
    SUSPEND_TO_RAM,
    make_boot_sector,
    make_reading_boot_sector,
)
from tests.conftest import make_raw
from tests.machines import Machine, idle_machine

#: A disk whose every read fails.
_FAILS = {
    "driver": "blkdebug",
    "node-name": "fails",
    "image": {"driver": "null-co", "size": 1 << 20},
    "inject-error": [{"event": "none", "iotype": "read", "errno": 5}],
}

#: For each run state, QEMU's options, and the I/O port and the value that the guest writes to it, if any.
_SETUPS: dict[str, tuple[tuple[str, ...], tuple[int, int] | None]] = {
    "prelaunch": (("-S",), None),
    "inmigrate": (("-incoming", "defer"), None),
    "guest-panicked": (("-device", "pvpanic", "-action", "panic=pause"), (PVPANIC, PANICKED)),
    "io-error": (("-blockdev", json.dumps(_FAILS), "-device", "virtio-blk-pci,drive=fails,rerror=stop"), None),
    "watchdog": (("-device", "ib700", "-action", "watchdog=pause"), (IB700, AT_ONCE)),
    "shutdown": (("-no-shutdown",), (ACPI_CONTROL, SOFT_OFF)),
    "suspended": ((), (ACPI_CONTROL, SUSPEND_TO_RAM)),
    "running": ((), None),
    "paused": ((), None),
    "postmigrate": ((), None),
    "finish-migrate": ((), None),
}


@contextlib.asynccontextmanager
async def machine_in(state: str, qemu: str, folder: Path) -> AsyncIterator[Machine]:
    """Start a machine, and bring it into a run state."""
    arguments, write = _SETUPS[state]
    if state == "io-error":
        image = make_reading_boot_sector(folder / "boot")
    else:
        image = make_boot_sector(folder / "boot", *write) if write else make_raw(folder / "boot", 1 << 20)
    async with contextlib.AsyncExitStack() as closing:
        machine = await closing.enter_async_context(
            idle_machine(qemu, folder, image=str(image), qemu_arguments=arguments)
        )
        if state == "paused":
            await machine.pause()
        elif state in ("postmigrate", "finish-migrate"):
            await migrate(machine, folder, closing, hold=state == "finish-migrate")
        await until(machine, state)
        yield machine


async def migrate(machine: Machine, folder: Path, closing: contextlib.AsyncExitStack, *, hold: bool = False) -> None:
    """Migrate to a reader that discards the machine's state. With `hold`, QEMU waits before it releases the images."""

    async def swallow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(1 << 16):
            pass
        writer.close()

    server = await asyncio.start_unix_server(swallow, folder / "there")
    closing.callback(server.close)
    capability = {"capability": "pause-before-switchover", "state": hold}
    await machine.monitor.execute("migrate-set-capabilities", {"capabilities": [capability]})
    await machine.monitor.execute("migrate", {"uri": f"unix:{folder / 'there'}"})


async def qemu_state(machine: Machine) -> str:
    """Return QEMU's own run state."""
    return str((await machine.monitor.execute("query-status"))["status"])


async def until(machine: Machine, *states: str) -> None:
    """Wait until QEMU is in one of the states, by polling, because changes by a migration have no event."""
    async with asyncio.timeout(15):
        while await qemu_state(machine) not in states:  # noqa: ASYNC110 - it has no event
            await asyncio.sleep(0.02)
