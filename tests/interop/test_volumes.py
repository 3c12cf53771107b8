# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests volumes of systemd's storage providers, at boot and while a machine runs."""

import json
from collections.abc import Callable
from typing import Any

from tests.interop.box import Box
from tests.interop.conftest import make_image
from tests.interop.machines import BoxedMachine
from tests.machines import fresh_name

IDLE = ("--firmware=bios", "--ram=64M", "--console=headless")


def volumes(box: Box) -> dict[str, Any]:
    """Return storagectl's list of volumes, by name."""
    listed = json.loads(box.run("storagectl", "volumes", "--json=short").stdout or "[]")
    return {each["name"]: each for each in listed}


def disks(box: Box, machine: BoxedMachine) -> dict[str, Any]:
    listed = json.loads(box.run("vmctl", "list-disks", machine.name, "--json=short").stdout)
    return {each["name"]: each for each in listed}


def test_a_volume_is_created_at_boot_and_cannot_be_unbound(box: Box, spawn: Callable[..., BoxedMachine]) -> None:
    name = f"{fresh_name()}.volume"
    wanted = f"fs:{name}:nvme:create=new,size=8M,template=sparse-file"
    machine = spawn(f"--image={make_image(box)}", *IDLE, f"--bind-volume={wanted}")
    machine.wait_for("is running")
    assert name in volumes(box)
    disk = disks(box, machine)[f"fs:{name}"]
    assert (disk["bus"], disk["boot"], disk["sizeBytes"]) == ("nvme", True, 8 << 20)
    for program in ("machinectl", "vmctl"):
        done = box.run(program, "unbind-volume", machine.name, f"fs:{name}", check=False)
        assert done.returncode != 0
        assert "StorageImmutable" in done.stderr or "boot" in done.stderr


def test_vmctl_binds_and_unbinds_a_volume(box: Box, idle: BoxedMachine) -> None:
    name = f"{fresh_name()}.volume"
    box.run("vmctl", "bind-volume", idle.name, f"fs:{name}:virtio-scsi:create=new,size=4M,template=sparse-file")
    assert disks(box, idle)[f"fs:{name}"]["bus"] == "virtio-scsi"
    again = box.run("vmctl", "bind-volume", idle.name, f"fs:{name}:virtio-scsi:create=new,size=4M", check=False)
    assert again.returncode == 1
    assert "the volume exists already" in again.stderr
    box.run("vmctl", "unbind-volume", idle.name, f"fs:{name}")
    assert f"fs:{name}" not in disks(box, idle)
    box.run("vmctl", "bind-volume", idle.name, f"fs:{name}:virtio-scsi:create=open,read-only=yes")
    assert disks(box, idle)[f"fs:{name}"]["readOnly"] is True


def test_a_missing_volume_ends_the_start_with_the_reason(box: Box) -> None:
    done = box.run("vmspawn", f"--image={make_image(box)}", *IDLE, "--bind-volume=fs:none:create=open", check=False)
    assert done.returncode == 1
    assert "cannot get the volume fs:none: there is no such volume" in done.stderr
    assert "Traceback" not in done.stderr
