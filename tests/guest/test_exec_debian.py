# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests commands in Debian, booted in several ways.

Debian 13 gets the agent as a credential. In Debian 12, the agent is installed.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests import debian, ovmf
from tests.commands import vmctl
from tests.machines import Machine, fresh_name

pytestmark = [pytest.mark.soak, pytest.mark.timeout(900)]

ROOT = (f"root=LABEL={debian.LABEL}", "rw")

#: Seconds under emulation on a busy host.
BOOT_TIMEOUT = 500.0


@pytest.fixture(autouse=True)
def _needs() -> None:
    debian.need()


@asynccontextmanager
async def booted(qemu: str, **options: Any) -> AsyncIterator[Machine]:
    """Boot a Debian, and wait for its agent."""
    settings: dict[str, Any] = {
        "image": str(debian.disk()),
        "image_format": "raw",
        "ephemeral": True,
        "ram": 1 << 30,
        "qemu": qemu,
        "name": fresh_name(),
        "console": "headless",
    }
    async with Machine(**{**settings, **options}) as machine:
        # The agent is up long before the guest has booted; until then the guest takes many seconds for new ports.
        wait = ["systemctl", "is-system-running", "--wait"]
        async with await machine.execute(wait, start_timeout=BOOT_TIMEOUT) as command:
            await command.communicate()
        yield machine


async def use(machine: Machine) -> None:
    """Run commands that use systemd, files and signals."""
    done = await machine.run("cat; id -un; exit 5", input="hello\n")
    assert (done.status, done.stdout) == (5, "hello\nroot\n")
    data = bytes(range(256)) * 4096
    assert (await machine.run(["cat"], input=data, text=False)).stdout == data
    # The agent's service runs the commands, and is active.
    done = await machine.run("systemctl is-active vmspawn-agent.service; cat /proc/self/cgroup")
    assert done.stdout.splitlines()[0] == "active"
    assert "vmspawn-agent.service" in done.stdout
    # Closing the command kills all its processes, which have their own control group.
    async with await machine.execute(["sh", "-c", "setsid sleep 54321 & echo x; exec sleep 54321"]) as command:
        assert command.stdout is not None
        await command.stdout.readline()
    async with asyncio.timeout(60):
        while (await machine.run("pgrep -f '^sleep 54321'")).status == 0:  # noqa: ASYNC110 - no event reports it
            await asyncio.sleep(0.1)


@pytest.mark.asyncio
async def test_commands_run_in_a_debian_booted_by_bios(qemu: str) -> None:
    async with booted(qemu) as machine:
        await use(machine)


@pytest.mark.asyncio
async def test_commands_run_in_a_debian_booted_by_uefi(
    qemu: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ovmf.install(tmp_path / "config")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    async with booted(qemu) as machine:
        assert (await machine.run("ls -d /sys/firmware/efi")).status == 0
        await use(machine)


@pytest.mark.asyncio
async def test_commands_run_in_a_debian_booted_from_its_kernel(qemu: str) -> None:
    linux, initrd = debian.kernel()
    async with booted(qemu, linux=str(linux), initrd=str(initrd), kernel_arguments=("rw",)) as machine:
        await use(machine)


@pytest.mark.asyncio
async def test_commands_run_in_an_older_debian_with_the_agent_installed(qemu: str, tmp_path: Path) -> None:
    tree = debian.tree(debian.OLDER)
    assert vmctl("agent", f"--root={tree}").returncode == 0
    linux, initrd = debian.kernel(debian.OLDER)
    image = debian.root(tmp_path / "root", tree)
    async with booted(qemu, image=str(image), linux=str(linux), initrd=str(initrd), kernel_arguments=ROOT) as machine:
        await use(machine)
