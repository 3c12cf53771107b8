# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests each verb in each run state that a QEMU without an operating system can enter.

`internal-error` needs KVM, and in `save-vm` QEMU answers no monitor.
"""

import json
import typing
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.bootsector import ACPI_CONTROL, SUSPEND_TO_RAM, make_boot_sector
from tests.commands import one_line, spawned, vmctl
from tests.machines import idle_machine, next_event
from tests.qemu.run_states import machine_in, qemu_state, until
from vmspawn.errors import NotSupported
from vmspawn.machine.run_states import RULES

#: By state and verb: the next state, or None if the verb is refused.
_EXPECTED: dict[str, dict[str, str | None]] = {
    "running": {"pause": "paused", "resume": "running", "reboot": "running", "poweroff": "running"},
    "paused": {"pause": "paused", "resume": "running", "reboot": "prelaunch", "poweroff": "paused"},
    "prelaunch": {"pause": "prelaunch", "resume": "running", "reboot": "prelaunch", "poweroff": None},
    "inmigrate": {"pause": "inmigrate", "resume": "inmigrate", "reboot": None, "poweroff": None},
    "guest-panicked": {
        "pause": "guest-panicked",
        "resume": "running",
        "reboot": "guest-panicked",
        "poweroff": None,
    },
    "io-error": {"pause": "io-error", "resume": "io-error", "reboot": "io-error", "poweroff": "io-error"},
    "watchdog": {"pause": "watchdog", "resume": "running", "reboot": "watchdog", "poweroff": "watchdog"},
    "shutdown": {"pause": "shutdown", "resume": None, "reboot": "shutdown", "poweroff": None},
    "suspended": {"resume": "running", "reboot": "suspended", "poweroff": "running"},
    "postmigrate": {"pause": "postmigrate", "resume": "running", "reboot": "prelaunch", "poweroff": "postmigrate"},
    "finish-migrate": {"pause": "finish-migrate", "resume": None, "reboot": None, "poweroff": None},
}

#: States of a guest that has stopped by itself. A reset makes it run, and stop again in the same way.
_RUN_AGAIN = ("guest-panicked", "io-error", "watchdog", "shutdown", "suspended")

_CASES = [(state, verb) for state, verbs in _EXPECTED.items() for verb in verbs]


@pytest.mark.parametrize(("state", "verb"), _CASES, ids=lambda value: value)
async def test_a_verb_has_the_effect_in_the_table(state: str, verb: str, qemu: str, tmp_path: Path) -> None:
    async with machine_in(state, qemu, tmp_path) as machine:
        verbs: dict[str, Callable[[], typing.Any]] = {
            "pause": machine.pause,
            "resume": machine.resume,
            "reboot": machine.reboot,
            "poweroff": machine.power_off,
        }
        expected = _EXPECTED[state][verb]
        with machine.monitor.events() as events:
            if expected is None:
                with pytest.raises(NotSupported, match=f"the guest is {state}: "):
                    await verbs[verb]()
                assert await qemu_state(machine) == state
                return
            await verbs[verb]()
            if verb == "reboot" and state in _RUN_AGAIN:
                # The guest has run, and stopped again in the same way.
                await next_event(events, "RESET")
                await next_event(events, "RESUME")
            elif verb == "resume" and expected == state == "io-error":
                # The guest ran, and QEMU repeated the failed request.
                await next_event(events, "RESUME")
            await until(machine, expected)
        assert await machine.status() == expected


@pytest.mark.parametrize("state", ["prelaunch", "inmigrate", "shutdown", "suspended", "postmigrate"])
async def test_a_machine_ends_from_any_state(state: str, qemu: str, tmp_path: Path) -> None:
    async with machine_in(state, qemu, tmp_path) as machine:
        await machine.terminate()
        assert (await machine.wait()).reason == "host-qmp-quit"


async def test_a_suspended_guest_is_paused_where_qemu_can_do_that(qemu: str, tmp_path: Path) -> None:
    async with machine_in("suspended", qemu, tmp_path) as machine:
        try:
            await machine.pause()
        except NotSupported:
            assert await qemu_state(machine) == "suspended"
            return
        assert await qemu_state(machine) == "paused"
        await machine.resume()
        await until(machine, "running")


async def test_the_table_knows_every_state_of_this_qemu(qemu: str, tmp_path: Path) -> None:
    async with idle_machine(qemu, tmp_path) as machine:
        schema = await machine.monitor.execute("query-qmp-schema")
        by_name = {each["name"]: each for each in schema}
        status = by_name[by_name["query-status"]["ret-type"]]
        (member,) = [each for each in status["members"] if each["name"] == "status"]
        states = set(by_name[member["type"]]["values"])
    assert "suspended" in states
    for verb, rules in RULES.items():
        assert states <= set(rules), verb


async def test_the_state_after_a_clients_reset_is_shown(qemu: str, tmp_path: Path) -> None:
    async with machine_in("paused", qemu, tmp_path) as machine:
        await machine.monitor.execute("system_reset")
        await until(machine, "prelaunch")
        assert machine.run_state == "prelaunch"


def test_vmctl_reports_the_effect_of_a_verb_in_a_state(qemu: str, tmp_path: Path) -> None:
    image = make_boot_sector(tmp_path / "boot", ACPI_CONTROL, SUSPEND_TO_RAM)
    options = (f"--qemu={qemu}", f"--image={image}", "--ram=64M", "--console=headless", "--qemu-arg=-S")
    with spawned(*options) as running:
        running.wait_for("is running")
        name = running.name
        refused = vmctl("poweroff", name)
        assert refused.returncode == 1
        assert one_line(refused, "vmctl").endswith(
            f"cannot poweroff {name}: the guest is prelaunch: it was not started"
        )
        again = vmctl("reboot", name)
        assert again.returncode == 0
        assert f"it was not started; to start it: vmctl resume {name}" in again.stderr
        assert vmctl("resume", name).returncode == 0
        assert status_of(name) in ("running", "suspended")


def status_of(name: str) -> str:
    found = json.loads(vmctl("status", name, "--json=short").stdout)
    assert found["responding"]
    return str(found["status"])
