# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests saves in each of QEMU's run states: the copy has its source's state, or the save is refused with a reason."""

from pathlib import Path

import pytest

from tests.copies import snapshot_paths
from tests.qemu.run_states import machine_in, qemu_state
from tests.snapshots import saved
from vmspawn.errors import SnapshotBlocked

#: The hint for each state that cannot be saved. `internal-error` needs KVM.
_REFUSED = {
    "io-error": "vmctl resume",
    "guest-panicked": "vmctl resume",
    "suspended": "vmctl resume",
    "shutdown": "reboot the machine, or terminate it",
    "prelaunch": "vmctl resume",
    "watchdog": "vmctl resume",
    "inmigrate": "vmctl resume",
    "postmigrate": "vmctl resume",
    "finish-migrate": "wait until the operation has completed",
}

#: States that only the soak tries, to save time.
_RARE = ("prelaunch", "watchdog", "inmigrate", "shutdown")

_CASES = [pytest.param(each, marks=pytest.mark.soak) if each in _RARE else each for each in _REFUSED]


@pytest.mark.parametrize("state", _CASES)
async def test_a_save_is_refused_in_states_other_than_running_and_paused(state: str, qemu: str, tmp_path: Path) -> None:
    before = snapshot_paths()
    async with machine_in(state, qemu, tmp_path) as machine:
        # The events that led to this state come before the reply.
        await machine.monitor.execute("query-status")
        with machine.monitor.events() as events:
            with pytest.raises(SnapshotBlocked, match=f"its guest is in state {state}") as caught:
                await machine.snapshot()
            assert _REFUSED[state] in caught.value.hint
            assert await qemu_state(machine) == state
            # Nothing was paused, and nothing resumed.
            events.close()
            assert not [event.name async for event in events if event.name in ("STOP", "RESUME", "MIGRATION")]
    assert snapshot_paths() == before


@pytest.mark.parametrize("state", ["running", "paused"])
async def test_the_copy_is_in_the_state_of_its_source(state: str, qemu: str, tmp_path: Path) -> None:
    async with machine_in(state, qemu, tmp_path) as machine, saved(machine) as snapshot:
        assert await qemu_state(machine) == state
        async with snapshot.fork() as copy:
            assert await copy.status() == state
