# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests the unit vmspawn@.service: systemctl starts and stops an image by its name."""

import json
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.disks import make_builtin_disk
from tests.interop.box import PROJECT, Box
from tests.interop.machines import machine_registration

NAME = "by-unit"

#: Settings for a drop-in: options for a quicker boot, and a watchdog whose interval is shorter than the boot.
OPTIONS = "--machine=%i --ram=512M --firmware=bios"
WATCHDOG = "WatchdogSec=5s"


@pytest.fixture
def image(box: Box) -> None:
    """Make a bootable image in the directory where vmspawn finds it by its name."""
    make_builtin_disk(box.path(f"/var/lib/machines/{NAME}.raw"))


@contextmanager
def drop_in(box: Box, template: str, command: str) -> Iterator[str]:
    """Override the command of the image's instance of a template unit. Kills the instance at the end."""
    unit = f"{template}@{NAME}.service"
    folder = box.path(f"/run/systemd/system/{unit}.d")
    folder.mkdir(exist_ok=True)
    (folder / "test.conf").write_text(f"[Service]\n{WATCHDOG}\nExecStart=\nExecStart={command} {OPTIONS}\n")
    box.run("systemctl", "daemon-reload")
    yield unit
    box.run("systemctl", "kill", "--signal=KILL", unit, check=False)


@pytest.fixture
def unit(box: Box, image: None) -> Iterator[str]:
    """Install vmspawn's unit, and return the name of the instance that runs the image."""
    box.path("/run/systemd/system/vmspawn@.service").write_bytes((PROJECT / "systemd/vmspawn@.service").read_bytes())
    command = "vmspawn --adopt-or-start --quiet --keep-unit --console=headless --network-user-mode"
    with drop_in(box, "vmspawn", command) as installed:
        yield installed


def test_machinectl_starts_an_image_by_systemds_own_unit_with_vmspawns_command(box: Box, image: None) -> None:
    """The unit's sandbox and options are unchanged, except the option for a TAP device, which vmspawn does not have."""
    theirs = box.run("systemctl", "cat", f"systemd-vmspawn@{NAME}.service").stdout
    command = next(line for line in theirs.splitlines() if line.startswith("ExecStart=systemd-vmspawn "))
    ours = command.removeprefix("ExecStart=systemd-").replace("--network-tap", "--network-user-mode")
    with drop_in(box, "systemd-vmspawn", ours) as unit:
        box.run("machinectl", "start", "--runner=vmspawn", NAME)
        found = machine_registration(box, NAME)
        assert found is not None
        assert (found["unit"], found["service"]) == (unit, "vmspawn")
        box.run("systemctl", "stop", unit, timeout=150)
        shown = box.run("systemctl", "show", unit, "--property=Result,ActiveState").stdout.split()
        assert set(shown) == {"Result=success", "ActiveState=inactive"}
    assert machine_registration(box, NAME) is None


def test_start_boots_the_image_and_stop_shuts_the_guest_down(box: Box, unit: str) -> None:
    assert box.run("systemd-analyze", "verify", "--man=no", "/run/systemd/system/vmspawn@.service").stderr == ""
    box.run("systemctl", "start", unit)
    found = machine_registration(box, NAME)
    assert found is not None
    assert found["unit"] == unit
    assert "vmspawn" in box.run("machinectl", "status", NAME).stdout
    # The manager presses the power button until the guest, which is still booting, reacts.
    box.run("systemctl", "stop", unit)
    shown = box.run("systemctl", "show", unit, "--property=Result,ExecMainStatus,ActiveState").stdout.split()
    assert set(shown) == {"Result=success", "ExecMainStatus=0", "ActiveState=inactive"}
    assert machine_registration(box, NAME) is None


def test_qemu_outlives_the_main_process_and_is_adopted(box: Box, unit: str) -> None:
    """After the main process is killed, the service's next main process has the same QEMU, and can stop it."""
    box.run("systemctl", "start", unit)
    qemu = process_of_qemu(box)
    before = main_process(box, unit)
    box.run("systemctl", "kill", "--kill-whom=main", "--signal=KILL", unit)
    # The restarted unit becomes active when its new manager has adopted the machine.
    again = f"[ $(systemctl show --property=MainPID --value {unit}) != {before} ]"
    box.run("sh", "-c", f"until {again} && systemctl --quiet is-active {unit}; do :; done")
    assert main_process(box, unit) != before
    assert process_of_qemu(box) == qemu
    found = machine_registration(box, NAME)
    assert found is not None
    box.run("systemctl", "stop", unit)
    shown = box.run("systemctl", "show", unit, "--property=Result,ActiveState").stdout.split()
    assert set(shown) == {"Result=success", "ActiveState=inactive"}
    assert machine_registration(box, NAME) is None


def main_process(box: Box, unit: str) -> str:
    return box.run("systemctl", "show", "--property=MainPID", "--value", unit).stdout.strip()


def process_of_qemu(box: Box) -> int:
    found = json.loads(box.run("vmctl", "status", NAME, "--json=short").stdout)
    return int(found["processId"])
