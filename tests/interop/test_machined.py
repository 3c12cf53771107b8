# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests that systemd-machined registers vmspawn's machines, and that machinectl controls them."""

import json
import signal
from collections.abc import Callable
from pathlib import Path

from tests.interop.box import Box
from tests.interop.conftest import make_image
from tests.interop.machines import BoxedMachine
from tests.machines import fresh_name

Spawn = Callable[..., BoxedMachine]

MACHINED = "/run/systemd/machine/io.systemd.Machine"

#: The members of a registration that do not depend on the manager.
KEPT = ("leader", "controlAddress", "unit", "service", "class")

#: Starts root's user service manager (user@0.service), and in it machined and the bus that machined needs.
USERS_MANAGER = r"""
set -e
export XDG_RUNTIME_DIR=/run/user/0
trap 'systemctl stop user@0.service' EXIT
mkdir -p /run/systemd/system/user@0.service.d
printf '[Service]\nEnvironment=XDG_RUNTIME_DIR=%s DBUS_SESSION_BUS_ADDRESS=unix:path=%s/bus\n' \
    $XDG_RUNTIME_DIR $XDG_RUNTIME_DIR >/run/systemd/system/user@0.service.d/test.conf
systemctl daemon-reload
systemctl start user-runtime-dir@0.service user@0.service
mkdir -p $XDG_RUNTIME_DIR/systemd/user
printf '[Socket]\nListenStream=%%t/bus\n' >$XDG_RUNTIME_DIR/systemd/user/dbus.socket
printf '[Unit]\nRequires=dbus.socket\n[Service]\nType=notify\nExecStart=dbus-daemon --session %s\n' \
    "--address=systemd: --nofork --nopidfile --systemd-activation" >$XDG_RUNTIME_DIR/systemd/user/dbus.service
systemctl --user daemon-reload
systemctl --user start dbus.socket dbus.service systemd-machined.socket
"""

#: Runs a machine in that service manager. Prints the record of the user's machined, machinectl's list, and the record
#: after the machine's end.
USERS_MACHINE = """
list="varlinkctl call --json=short $XDG_RUNTIME_DIR/systemd/machine/io.systemd.Machine io.systemd.Machine.List"
systemd-run --user --quiet --service-type=notify --unit=users vmspawn --image={image} --firmware=bios --ram=64M \
    --console=headless --user --register=yes --machine=users
$list '{{"name":"users"}}'
echo ---
machinectl --user list
echo ---
machinectl --user terminate users
while [ "$(systemctl --user show --property=ActiveState --value users)" != inactive ]; do :; done
$list '{{"name":"users"}}' 2>&1 || :
"""

#: Options for a machine that stays in its firmware.
IDLE = ("--firmware=bios", "--ram=64M", "--console=headless")


def boot_builtin(spawn: Spawn, *arguments: str) -> BoxedMachine:
    machine = spawn("--guest=builtin", *arguments)
    machine.wait_for("vmspawn-guest: ready", stream="stdout")
    return machine


def test_a_machine_is_registered_with_what_machinectl_needs(box: Box, spawn: Spawn) -> None:
    uuid = "6f1d2a1e8f0b4c7d9a3e5b7c9d1f2a3b"
    machine = spawn(f"--image={make_image(box)}", *IDLE, f"--uuid={uuid}")
    machine.wait_for("is running")
    found = machine.registration()
    assert found is not None
    assert (found["class"], found["service"], found["id"]) == ("vm", "vmspawn", uuid)
    assert found["controlAddress"] == machine.control
    assert found["leader"]["pid"] == machine.call("io.vmspawn.Machine.Describe")["processId"]
    assert found["unit"] == f"machine-{machine.name}.scope"


def test_machinectl_lists_a_machine_and_shows_its_status(box: Box, idle: BoxedMachine) -> None:
    listed = json.loads(box.run("machinectl", "list", "--output=json").stdout)
    assert [(each["class"], each["service"]) for each in listed if each["machine"] == idle.name] == [("vm", "vmspawn")]
    status = box.run("machinectl", "status", idle.name).stdout
    assert "vmspawn; class vm" in status
    assert f"machine-{idle.name}.scope" in status


def test_machinectl_pauses_and_resumes_a_machine(idle: BoxedMachine) -> None:
    idle.machinectl("pause")
    assert idle.call("io.systemd.MachineInstance.Describe") == {"running": False, "status": "paused"}
    idle.machinectl("resume")
    assert idle.call("io.systemd.MachineInstance.Describe") == {"running": True, "status": "running"}


def test_machinectl_terminate_ends_the_machine_and_its_registration(idle: BoxedMachine) -> None:
    idle.machinectl("terminate")
    assert idle.wait() == 0
    assert idle.registration() is None


def test_machinectl_reboots_and_powers_off_a_guest(spawn: Spawn) -> None:
    machine = boot_builtin(spawn)
    machine.output["stdout"] = ""
    machine.machinectl("reboot")
    machine.wait_for("vmspawn-guest: ready", stream="stdout")
    machine.machinectl("poweroff")
    assert machine.wait() == 0
    assert "the guest powered off" in machine.output["stderr"]
    assert machine.registration() is None


def test_machinectl_binds_and_unbinds_a_volume(box: Box, spawn: Spawn) -> None:
    machine = boot_builtin(spawn)
    volume = f"fs:{machine.name}.volume"
    box.run("machinectl", "bind-volume", machine.name, f"{volume}:nvme:create=new,size=8M,template=sparse-file")
    machine.wait_for("nvme", stream="stdout")
    disks = json.loads(box.run("vmctl", "list-disks", machine.name, "--json=short").stdout)
    assert [(each["name"], each["bus"]) for each in disks] == [(volume, "nvme")]
    box.run("machinectl", "unbind-volume", machine.name, volume)
    assert json.loads(box.run("vmctl", "list-disks", machine.name, "--json=short").stdout) == []


def test_stopping_the_unit_shuts_the_guest_down(box: Box, spawn: Spawn) -> None:
    machine = boot_builtin(spawn, "--keep-unit")
    found = machine.registration()
    assert found is not None
    assert found["unit"] == machine.unit
    # Only the manager gets the signal, as when systemd stops a unit with KillMode=mixed.
    box.run("systemctl", "kill", "--kill-whom=main", f"--signal={signal.SIGTERM.name}", machine.unit)
    assert machine.wait() == 0
    assert "the guest powered off" in machine.output["stderr"]
    assert machine.registration() is None


def test_a_machine_whose_qemu_is_killed_is_not_registered_any_more(box: Box, idle: BoxedMachine) -> None:
    pid = idle.call("io.vmspawn.Machine.Describe")["processId"]
    box.run("bash", "-c", f"kill -KILL {pid}")
    assert idle.wait() == 1
    assert idle.registration() is None


def test_slice_and_properties_apply_to_qemus_own_scope(box: Box, spawn: Spawn) -> None:
    settings = ("--slice=test-vm.slice", "--property=CollectMode=inactive-or-failed")
    machine = spawn(f"--image={make_image(box)}", *IDLE, *settings, name="with-dash")
    machine.wait_for("is running")
    found = machine.registration()
    assert found is not None
    assert found["unit"] == r"machine-with\x2ddash.scope"
    shown = box.run("systemctl", "show", found["unit"], "--property=Slice,CollectMode").stdout
    assert set(shown.split("\n")) >= {"Slice=test-vm.slice", "CollectMode=inactive-or-failed"}


def test_a_property_that_systemd_does_not_know_fails_in_one_line(box: Box) -> None:
    done = box.run(
        "vmspawn", f"--image={make_image(box)}", *IDLE, "--property=Nonsense=1", check=False, unit=("--wait", "--pipe")
    )
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if "KVM" not in line]
    assert len(lines) == 1
    assert "Nonsense" in lines[0]


def test_an_adopted_machine_stays_registered_and_is_unregistered_at_its_end(box: Box, spawn: Spawn) -> None:
    """The registration is renewed with the new manager's process; a lost one is made again, in the same scope."""
    machine = spawn(f"--image={make_image(box)}", *IDLE, "--register=yes", unit=("--property=KillMode=process",))
    machine.wait_for("is running")
    before = machine.registration()
    for lost in (False, True):
        kill_manager(box, machine.name)
        if lost:
            parameters = json.dumps({"name": machine.name})
            box.run("varlinkctl", "call", MACHINED, "io.systemd.Machine.Unregister", parameters)
            assert machine.registration() is None
        box.run("vmctl", "adopt", machine.name)
        found = machine.registration()
        assert before is not None
        assert found is not None
        assert [found[key] for key in KEPT] == [before[key] for key in KEPT]
        assert found["supervisor"]["pid"] == manager_of(box, machine.name)
        box.run("machinectl", "status", machine.name)
    box.run("machinectl", "terminate", machine.name)
    box.run("sh", "-c", f"while [ -e /run/vmspawn/{machine.name} ]; do :; done")
    assert machine.registration() is None


def kill_manager(box: Box, name: str) -> None:
    """Kill the manager of a machine, and wait until it has ended."""
    pid = manager_of(box, name)
    box.run("bash", "-c", f"kill -KILL {pid}; tail --pid={pid} --follow /dev/null")


def manager_of(box: Box, name: str) -> int:
    """Return the process id of a machine's only manager."""
    commands = {int(each.parent.name): command_line(each) for each in box.path("/proc").glob("[0-9]*/cmdline")}
    found = [pid for pid, words in commands.items() if "vmspawn.cli.spawn" in words and name in " ".join(words)]
    assert len(found) == 1, commands
    return found[0]


def command_line(path: Path) -> list[str]:
    try:
        return path.read_text().split("\0")
    except (FileNotFoundError, ProcessLookupError):
        return []  # The process ended after it was listed.


def test_a_machine_with_register_no_is_not_registered(box: Box, spawn: Spawn) -> None:
    machine = spawn(f"--image={make_image(box)}", *IDLE, "--register=no")
    machine.wait_for("is running")
    assert machine.registration() is None


def test_a_missing_machined_of_the_user_is_an_error_only_with_register_yes(box: Box, spawn: Spawn) -> None:
    machine = spawn(f"--image={make_image(box)}", *IDLE, "--user", "--register=auto")
    machine.wait_for("is running")
    assert "register" not in machine.output["stderr"]
    required = spawn(f"--image={make_image(box)}", *IDLE, "--user", "--register=yes")
    assert required.wait() == 1
    assert "cannot register the machine: systemd-machined does not run" in required.output["stderr"]
    assert not box.path(f"/run/vmspawn/{required.name}").exists()


def test_a_users_machined_registers_the_users_machine(box: Box) -> None:
    """In the box no login starts the user's machined and bus, so the test starts both."""
    done = box.run("bash", "-c", f"{USERS_MANAGER}\n{USERS_MACHINE.format(image=make_image(box))}")
    registered, listed, ended = done.stdout.split("---")
    found = json.loads(registered)
    assert (found["class"], found["service"], found["unit"]) == ("vm", "vmspawn", "machine-users.scope")
    assert "vmspawn" in listed
    assert "NoSuchMachine" in ended


def test_a_name_that_machined_already_has_is_refused_only_with_register_yes(box: Box, spawn: Spawn) -> None:
    first = spawn(f"--image={make_image(box)}", *IDLE)
    first.wait_for("is running")
    elsewhere = ("--setenv=VMSPAWN_RUNTIME_DIR=/run/elsewhere", f"--unit=test-{first.name}-again.service")
    again = spawn(f"--image={make_image(box)}", *IDLE, "--register=yes", unit=elsewhere, name=first.name)
    assert again.wait() == 1
    assert "knows another machine named" in again.output["stderr"]
    # With --register=auto the machine runs nevertheless.
    again = spawn(f"--image={make_image(box)}", *IDLE, unit=elsewhere, name=first.name)
    again.wait_for("is running")
    assert "not registered: systemd-machined knows another machine named" in again.output["stderr"]
    box.run("env", "VMSPAWN_RUNTIME_DIR=/run/elsewhere", "vmctl", "terminate", first.name)
    assert again.wait() == 0


def test_vmctl_finds_a_machine_with_another_runtime_directory(box: Box, spawn: Spawn) -> None:
    machine = spawn(f"--image={make_image(box)}", *IDLE, unit=("--setenv=VMSPAWN_RUNTIME_DIR=/run/elsewhere",))
    machine.wait_for("is running")
    listed = json.loads(box.run("vmctl", "list", "--json=short").stdout)
    assert machine.name in [each["name"] for each in listed]
    box.run("vmctl", "pause", machine.name)
    assert "paused" in box.run("vmctl", "status", machine.name).stdout


def test_vmctl_finds_the_machines_of_systemd_vmspawn(box: Box) -> None:
    name = fresh_name()
    image = make_image(box)
    options = ("--firmware=bios", "--ram=256M", "--console=headless", "--kvm=no", "--vsock=no", "--tpm=no")
    unit = ("--service-type=notify", f"--unit=test-{name}.service")
    box.run(
        *("systemd-vmspawn", f"--image={image}", "--notify-ready=no", "--register=yes", *options, f"--machine={name}"),
        unit=unit,
    )
    try:
        listed = json.loads(box.run("vmctl", "list", "--json=short").stdout)
        assert {"name": name, "status": "running"}.items() <= next(
            each for each in listed if each["name"] == name
        ).items()
        box.run("vmctl", "pause", name)
        assert "paused" in box.run("vmctl", "status", name).stdout
    finally:
        box.run("vmctl", "terminate", name)


def test_a_unit_of_type_notify_is_up_once_the_machine_runs(box: Box, spawn: Spawn) -> None:
    machine = spawn(f"--image={make_image(box)}", *IDLE, unit=("--service-type=notify",))
    machine.wait_for("is running")
    shown = box.run("systemctl", "show", machine.unit, "--property=StatusText,SubState").stdout
    assert set(shown.split("\n")) >= {f"StatusText=Machine {machine.name} is running", "SubState=running"}
