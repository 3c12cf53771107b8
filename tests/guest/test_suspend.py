# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests how resume, reboot and poweroff affect a guest that is suspended to memory (S3)."""

import json
import time
from collections.abc import Iterator

import pytest

from tests.commands import DEADLINE, vmctl
from tests.terminal import PROMPT, Seated, seated

READY = b"vmspawn-guest: ready"


def suspend(machine: Seated) -> None:
    machine.type(b"echo mem >/sys/power/state; echo awa''ke\n")
    deadline = time.monotonic() + DEADLINE
    while status(machine) != "suspended":
        assert time.monotonic() < deadline, "the guest did not suspend"


def status(machine: Seated) -> str:
    return str(json.loads(vmctl("status", machine.name, "--json=short").stdout)["status"])


@pytest.fixture
def asleep(qemu: str) -> Iterator[Seated]:
    """Start a guest that has booted, and suspend it."""
    with seated(f"--qemu={qemu}", "--guest=builtin", "--warm") as machine:
        machine.expect(READY)
        machine.expect(PROMPT)
        suspend(machine)
        yield machine


def test_a_suspended_guest_is_resumed(asleep: Seated) -> None:
    assert vmctl("resume", asleep.name).returncode == 0
    asleep.expect(rb"awake\r\n")
    assert status(asleep) == "running"


def test_a_suspended_guest_reboots(asleep: Seated) -> None:
    assert vmctl("reboot", asleep.name).returncode == 0
    asleep.expect(READY)
    assert status(asleep) == "running"


def test_a_suspended_guest_is_woken_up_to_power_off(asleep: Seated) -> None:
    pressed = vmctl("poweroff", asleep.name)
    assert pressed.returncode == 0
    assert "the guest was woken up" in pressed.stderr
    asleep.expect(rb"awake\r\n")
