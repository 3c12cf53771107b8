# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests vmctl with a machine that a Python program runs: the program serves it, or vmctl reports that it does not."""

import asyncio
import json
import os
import subprocess
from pathlib import Path

from tests.commands import one_line, vmctl
from tests.machines import idle_machine, is_gone


async def ctl(*arguments: str) -> subprocess.CompletedProcess[str]:
    return await asyncio.to_thread(vmctl, *arguments)


async def test_vmctl_controls_a_machine_of_a_program(qemu: str, tmp_path: Path) -> None:
    async with idle_machine(qemu, tmp_path, control=True) as machine:
        listed = await ctl("list", "--json=short")
        assert machine.name in {each["name"] for each in json.loads(listed.stdout) if each["status"] == "running"}
        assert (await ctl("pause", machine.name)).returncode == 0
        assert await machine.status() == "paused"
        assert json.loads((await ctl("qmp", machine.name, "query-status")).stdout)["status"] == "paused"
        assert (await ctl("terminate", machine.name)).returncode == 0
        assert (await machine.wait()).reason == "host-qmp-quit"
    assert is_gone(machine.name)


async def test_vmctl_reports_that_a_machine_is_not_served(qemu: str, tmp_path: Path) -> None:
    async with idle_machine(qemu, tmp_path, control=False) as machine:
        for verb in ("status", "terminate", "pause"):
            refused = await ctl(verb, machine.name)
            assert refused.returncode == 1
            assert f"is run by process {os.getpid()}, which serves no control socket" in one_line(refused, "vmctl")
        listed = json.loads((await ctl("list", "--json=short")).stdout)
        assert [each["status"] for each in listed if each["name"] == machine.name] == ["not served"]
        adopted = await ctl("adopt", machine.name)
        assert adopted.returncode == 1
        assert f"is run by process {os.getpid()}" in adopted.stderr
        assert await machine.status() == "running"
