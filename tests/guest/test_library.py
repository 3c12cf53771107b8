# SPDX-License-Identifier: LGPL-2.1-or-later
"""The library types on the console of a booted guest, and reads it."""

import asyncio

import pytest

import vmspawn
from tests.machines import Machine, fresh_name

DEADLINE = 60.0


async def test_both_kinds_of_machines_type_on_the_console_and_read_it(qemu: str) -> None:
    async with Machine(guest="builtin", name=fresh_name(), qemu=qemu, control=True) as machine:
        ours: vmspawn.Console = vmspawn.Machine.console.fget(machine)  # type: ignore[attr-defined]
        await ours.expect("vmspawn-guest: ready", timeout=DEADLINE)
        async with vmspawn.connect(machine.name) as connected:
            theirs = connected.console
            await theirs.expect("vmspawn-guest: ready", timeout=DEADLINE)
            assert theirs.before[-500:] == ours.before[-500:]
            await theirs.send_line("echo $((6 * 7)) is the answer")
            for console in (ours, theirs):
                found = await console.expect(r"\n(\d+) is the answer\n", timeout=DEADLINE)
                assert found[1] == "42"
            waiting = asyncio.create_task(theirs.expect("login: ", timeout=DEADLINE))
            await machine.power_off()
            with pytest.raises(vmspawn.MachineEnded) as caught:
                await waiting
            assert "42 is the answer" in caught.value.__notes__[-1]
