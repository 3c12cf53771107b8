# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests that sessions refuse commands for which the sandbox kills QEMU, and that a death by the sandbox is reported."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from tests.machines import idle_machine
from tests.qemu.qmp_fixtures import DEADLINE, Machine, Request, request_id
from vmspawn.errors import NotConnected, QmpError
from vmspawn.qmp.monitor import Command

SANDBOX = ("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny")


def human(line: str) -> Request:
    return "human-monitor-command", {"command-line": line}


#: Commands with which QEMU starts a program at once.
AT_ONCE: tuple[Request, ...] = (
    ("migrate", {"uri": "exec:true"}),
    ("migrate", {"channels": [{"channel-type": "main", "addr": {"transport": "exec", "args": ["/bin/true"]}}]}),
    ("netdev_add", {"type": "tap", "id": "n", "helper": "/bin/true"}),
    ("netdev_add", {"type": "tap", "id": "n"}),
    ("netdev_add", {"type": "bridge", "id": "n"}),
    human("migrate -d exec:true"),
    human('migrate "exec:true"'),
    human("netdev_add bridge,id=n"),
    human("netdev_add tap,id=n,helper=/bin/true"),
)

#: Commands with which QEMU starts a program when the guest connects, or when the device is removed.
LATER: tuple[Request, ...] = (
    ("netdev_add", {"type": "user", "id": "n", "guestfwd": [{"str": "tcp:10.0.2.100:80-cmd:true"}]}),
    ("netdev_add", {"type": "user", "id": "n", "smb": "/tmp"}),
    ("netdev_add", {"type": "tap", "id": "n", "script": "no"}),
    human("netdev_add user,id=n,guestfwd=tcp:10.0.2.100:80-cmd:true"),
)

#: Similar commands that start no program, whatever QEMU's reply is.
HARMLESS: tuple[Request, ...] = (
    ("netdev_add", {"type": "user", "id": "u"}),
    ("netdev_del", {"id": "u"}),
    ("netdev_add", {"type": "tap", "id": "t", "script": "no", "downscript": ""}),
    ("netdev_add", {"type": "tap", "id": "v", "fd": "none"}),
    ("migrate", {"uri": "unix:/proc/nonexistent/exec:"}),
    ("migrate", {"uri": 7}),
    ("migrate", {"channels": ["exec"]}),
    human("info version"),
    human("help migrate"),
    human("netdev_add user,id=w"),
)


@pytest.mark.parametrize("command", AT_ONCE, ids=request_id)
def test_qemu_itself_runs_no_command_that_a_session_refuses(qemu: str, command: Request) -> None:
    """A command that a session refuses could not succeed: QEMU dies, or refuses it too."""
    with Machine(qemu, 1, SANDBOX) as machine:
        client = machine.native().negotiate()
        client.send(json.dumps({"execute": command[0], "arguments": command[1]}).encode())
        while b'"event"' in (line := client.line()):
            pass
        # QEMU's human monitor returns its errors as text.
        assert line == b"" or b'"error"' in line or b"Error" in line
        client.close()


async def test_a_session_refuses_commands_that_start_a_program(qemu: str, tmp_path: Path) -> None:
    async with idle_machine(qemu, tmp_path) as machine, machine.qmp() as session:
        for name, arguments in (*AT_ONCE, *LATER):
            with pytest.raises(QmpError, match=f"command {name} is refused.*-sandbox spawn=deny") as caught:
                await session.execute(name, arguments)
            assert caught.value.error_class == "GenericError"
        for name, arguments in HARMLESS:
            (found,) = await session.execute_all([Command(name, arguments)])
            assert "sandbox" not in str(found)
        assert (await session.execute("query-status"))["running"] is True


async def test_without_a_sandbox_a_session_lets_qemu_start_a_program(qemu: str, tmp_path: Path) -> None:
    witness = tmp_path / "was-run"
    async with (
        idle_machine(qemu, tmp_path, qemu_arguments=("-sandbox", "off")) as machine,
        machine.qmp() as session,
        asyncio.timeout(DEADLINE),
    ):
        with session.events() as events:
            await session.execute(
                "migrate-set-capabilities", {"capabilities": [{"capability": "events", "state": True}]}
            )
            await session.execute("migrate", {"uri": f"exec:cat > {witness}"})
            async for event in events:
                if event.name == "MIGRATION" and (event.data or {}).get("status") in ("completed", "failed"):
                    break
        assert witness.exists()


async def test_a_death_by_the_sandbox_is_reported(qemu: str, tmp_path: Path) -> None:
    async with idle_machine(qemu, tmp_path) as machine:
        try:
            await machine.monitor.execute("migrate", {"uri": "exec:true"})
            await machine.monitor.execute("query-status")
        except QmpError:
            pytest.skip("this QEMU survives: its sandbox refuses the system call")
        except NotConnected:
            pass
        async with asyncio.timeout(DEADLINE):
            end = await machine.wait()
    assert not end.clean
    assert "SIGSYS" in end.message
    assert "sandbox" in end.message
