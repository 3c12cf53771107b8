# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests --time-limit=: a machine that exceeds its limit is ended, by any manager."""

import signal
from pathlib import Path

import pytest

from tests.commands import spawned, vmspawn
from tests.machines import idle_machine, is_gone


def test_a_machine_is_ended_at_its_limit_with_exit_status_124(options: tuple[str, ...]) -> None:
    with spawned(*options, "--time-limit=1.5") as machine:
        assert machine.wait() == 124
    assert "the machine was ended after 1.5 s" in machine.output["stderr"]
    assert is_gone(machine.name)


def test_a_machine_that_ends_in_time_is_not_ended_by_the_limit(options: tuple[str, ...]) -> None:
    with spawned(*options, "--time-limit=600") as machine:
        machine.wait_for("is running")
        assert machine.terminate()
        assert machine.wait() == 0


def test_the_limit_holds_for_the_next_manager(options: tuple[str, ...]) -> None:
    with spawned(*options, "--time-limit=12") as machine:
        machine.wait_for("is running")
        machine.signal(signal.SIGKILL)
        machine.wait()
        with spawned("--adopt", name=machine.name) as successor:
            assert successor.wait() == 124
    assert is_gone(machine.name)


async def test_a_program_gets_the_time_limit_as_the_reason_of_the_end(qemu: str, tmp_path: Path) -> None:
    async with idle_machine(qemu, tmp_path, time_limit=1.0) as machine:
        end = await machine.wait()
    assert (end.reason, end.clean) == ("time-limit", False)


@pytest.mark.parametrize("text", ["0", "-1", "soon", "1e3"])
def test_invalid_times_are_refused(text: str) -> None:
    done = vmspawn("--guest=builtin", f"--time-limit={text}")
    assert done.returncode == 2
    assert "--time-limit=" in done.stderr
