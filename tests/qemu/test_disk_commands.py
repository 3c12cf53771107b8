# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests vmctl's verbs for disks, as people and programs use them."""

import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pexpect
import pytest

from tests.commands import VMCTL, Spawned, idle, qemu_pid, spawned, vmctl
from tests.conftest import MIB, make_qcow2, make_raw
from tests.machines import links_of
from vmspawn.control.client import Client, VarlinkError

DEADLINE = 60.0


@pytest.fixture(scope="module")
def machine(qemu: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Spawned]:
    with idle(qemu, tmp_path_factory.mktemp("image")) as running:
        yield running


def run(*arguments: str) -> str:
    """Run a verb that must succeed; returns its output."""
    done = vmctl(*arguments)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def disk(machine: Spawned, name: str) -> dict[str, Any]:
    disks: list[dict[str, Any]] = json.loads(run("list-disks", machine.name, "--json=short"))
    return next(each for each in disks if each["name"] == name)


def test_a_disk_is_attached_changed_and_detached(machine: Spawned, tmp_path: Path) -> None:
    first, second = make_raw(tmp_path / "first", 4 * MIB), make_qcow2(tmp_path / "second", 6 * MIB)
    name = machine.name
    said = run("attach-disk", name, str(first), "--name=data", "--bus=virtio-scsi", "--iops=1K", "--discard=ignore")
    assert said == "Attached data on virtio-scsi at scsi0:0:0: /dev/disk/by-id/scsi-0QEMU_QEMU_HARDDISK_data\n"
    assert disk(machine, "data")["limits"]["iops"] == 1024
    assert run("resize-disk", name, "data", "5M") == "Resized data to 5M\n"
    assert run("resize-disk", name, "data", "+512K") == "Resized data to 5.5M\n"
    said = run("replace-disk", name, "data", str(second), "--format=qcow2")
    assert said == f"Replaced the image of data by {second}, 6M\n"
    found = disk(machine, "data")
    assert (found["format"], found["path"], found["sizeBytes"]) == ("qcow2", str(second), 6 * MIB)
    assert run("limit-disk", name, "data", "--bps-read=1M", "--burst=2") == "Limited data\n"
    limits = disk(machine, "data")["limits"]
    assert (limits["iops"], limits["bpsRead"], limits["burstPercent"]) == (0, MIB, 200)
    assert run("limit-disk", name, "data") == "data has no limits now\n"
    assert disk(machine, "data")["limits"] is None
    assert run("detach-disk", name, "data") == "Detached data\n"


def test_the_reaction_to_errors_is_an_option_of_boot_and_hotplugged_disks(qemu: str, tmp_path: Path) -> None:
    boot = make_raw(tmp_path / "boot", MIB)
    with spawned(
        f"--qemu={qemu}", f"--image={boot}", "--ram=64M", "--console=headless", "--on-error=report"
    ) as machine:
        machine.wait_for("is running")
        for name, options in (("other", ["--on-error=stop"]), ("usual", [])):
            run("attach-disk", machine.name, str(make_raw(tmp_path / name, MIB)), "--bus=virtio-scsi", *options)
        # QEMU's default is to stop the guest if the host has no space left.
        assert policies(machine) == {"boot": "report", "other": "stop", "usual": "auto"}


def policies(machine: Spawned) -> dict[str, str]:
    """Return QEMU's reaction to write errors, by the serial number of each disk."""

    def ask(command: str, path: str, *arguments: str) -> Any:
        return json.loads(run("qmp", machine.name, command, f"path=/machine/peripheral{path}", *arguments))

    kinds = {each["name"]: each["type"] for each in ask("qom-list", "")}
    disks = [name for name, kind in kinds.items() if kind in ("child<virtio-blk-pci>", "child<scsi-hd>")]
    return {
        ask("qom-get", f"/{disk}", "property=serial"): ask("qom-get", f"/{disk}", "property=werror") for disk in disks
    }


def test_media_come_and_go(machine: Spawned, tmp_path: Path) -> None:
    medium = make_raw(tmp_path / "medium", MIB)
    said = run("attach-disk", machine.name, "--bus=scsi-cd", "--name=cd")
    assert said.startswith("Attached cd on scsi-cd at scsi0:")
    assert "read-only" in said
    assert disk(machine, "cd")["path"] is None
    assert run("insert-media", machine.name, "cd", str(medium)) == f"Inserted {medium} into cd\n"
    assert disk(machine, "cd")["path"] == str(medium)
    assert run("eject-media", machine.name, "cd") == "Ejected the medium of cd\n"
    assert run("eject-media", machine.name, "cd") == "cd had no medium\n"
    assert disk(machine, "cd")["sizeBytes"] == 0
    assert disk(machine, "cd")["node"] is None
    run("detach-disk", machine.name, "cd")


def test_the_tables_have_a_line_for_each_disk(machine: Spawned, tmp_path: Path) -> None:
    run("attach-disk", machine.name, str(make_raw(tmp_path / "data", MIB)), "--bus=virtio-scsi", "--bps=1M")
    header, *lines = run("list-disks", machine.name, "--long").splitlines()
    columns = ["DISK", "BUS", "SIZE", "STATE", "BY-ID", "MODE", "FORMAT", "PLACE", "SERIAL"]
    columns += ["DEVICE", "NODE", "LIMITS", "FILE", "BACKING", "NOTICE"]
    assert header.split() == columns
    data = next(line for line in lines if line.startswith("data "))
    assert data.split()[1:4] == ["virtio-scsi", "1M", "attached"]
    assert data.split()[4:7] == ["scsi-0QEMU_QEMU_HARDDISK_data", "rw", "raw"]
    assert data.split()[8] == "data"
    device, node = data.split()[9:11]
    blocks = json.loads(run("qmp", machine.name, "query-block"))
    nodes = json.loads(run("qmp", machine.name, "query-named-block-nodes", "flat=true"))
    assert any(each["qdev"] == device and each["inserted"]["node-name"] == device for each in blocks)
    assert next(each for each in nodes if each["node-name"] == node)["image"]["virtual-size"] == MIB
    assert data.split()[-4:] == ["bps=1048576", str(tmp_path / "data"), "-", "-"]
    header, *short = run("list-disks", machine.name).splitlines()
    assert header.split() == columns[:5]
    assert [line.split() for line in short] == [line.split()[:5] for line in lines]
    header, *lines = run("list-disks", machine.name, "--stats").splitlines()
    assert header.split()[:3] == ["DISK", "READS", "READ"]
    assert [line.split()[0] for line in lines] == ["boot", "data"]
    found = json.loads(run("list-disks", machine.name, "--stats", "--json=short"))
    assert set(found[1]["perSecond"]) < set(found[1])
    run("detach-disk", machine.name, "data")


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (
            ["replace-disk", "{machine}", "nobody", "{image}"],
            1,
            "cannot replace nobody: there is no disk named nobody",
        ),
        (["replace-disk", "{machine}", "boot", "{image}"], 1, "cannot replace boot: boot is a boot disk"),
        (["resize-disk", "{machine}", "boot", "512"], 1, "would be lost"),
        (["resize-disk", "{machine}", "boot", "big"], 2, "SIZE big is not a size"),
        (["resize-disk", "{machine}", "boot", "++1M"], 2, "SIZE +1M is not a size"),
        (["resize-disk", "{machine}", "boot", "--shrink", "4_0M"], 2, "SIZE 4_0M is not a size"),
        (["attach-disk", "--boot-index", "1_0", "{machine}", "{image}"], 2, "1_0 is not a whole number"),
        (["attach-disk", "--boot-index=-1", "{machine}", "{image}"], 2, "-1 is not a whole number from 0"),
        (["limit-disk", "{machine}", "boot", "--burst=2"], 2, "--burst= needs a limit"),
        (["limit-disk", "{machine}", "boot", "--iops=1", "--burst=0"], 2, "0 is not a factor from 1 to 1000"),
        (["limit-disk", "{machine}", "boot", "--iops=1", "--burst=nan"], 2, "nan is not a factor from 1 to 1000"),
        (["limit-disk", "{machine}", "boot", "--iops=-1"], 2, "--iops=-1 is not a rate"),
        (["detach-disk", "{machine}", "boot", "--timeout=nan"], 2, "nan is not a number of seconds"),
        (["limit-disk", "{machine}", "boot", "--iops=1", "--iops-read=1"], 1, "exclude each other"),
        (["insert-media", "{machine}", "boot", "{image}"], 1, "has no media"),
        (["attach-disk", "{machine}", "{image}", "--bus=nvme", "--iothread"], 1, "bus nvme cannot have an I/O thread"),
        (["unbind-volume", "{machine}", "fs:no"], 1, "cannot unbind fs:no: there is no disk of that name"),
        (["unbind-volume", "{machine}", "boot"], 1, "cannot unbind boot: it is a boot disk"),
        (["attach-disk", "{machine}", "--bus=scsi-cd"], 2, "no image"),
        (["detach-disk", "{machine}", "boot", "--force"], 1, "cannot be detached while the machine runs"),
    ],
)
def test_an_impossible_change_is_reported_in_one_line(
    machine: Spawned, tmp_path: Path, arguments: list[str], status: int, message: str
) -> None:
    image = make_raw(tmp_path / "image", MIB)
    done = vmctl(*(argument.format(machine=machine.name, image=image) for argument in arguments))
    assert done.returncode == status
    first, *hint = done.stderr.splitlines()
    assert first.startswith("vmctl: ")
    assert message in first
    assert len(hint) <= 1


def test_a_hint_names_an_option_to_users_and_an_argument_to_clients(machine: Spawned) -> None:
    done = vmctl("resize-disk", machine.name, "boot", "512")
    assert done.stderr.splitlines()[1].strip() == "allow the loss with --shrink"
    with Client(machine.name) as client, pytest.raises(VarlinkError) as caught:
        client.call("io.vmspawn.Machine.ResizeStorage", {"name": "boot", "sizeBytes": 512, "shrink": False})
    assert caught.value.hint == "allow the loss with shrink=True"


def test_a_usage_error_with_a_prefix_has_exit_status_2(machine: Spawned) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "XDG_RUNTIME_DIR"}
    command = [*VMCTL, "bind-volume", machine.name, "fs:a", "--user"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=DEADLINE, check=False)
    assert (done.returncode, done.stderr.splitlines()) == (
        2,
        [
            "vmctl: cannot bind fs:a: no storage providers: XDG_RUNTIME_DIR is not set",
            "       use the system's providers with --system",
        ],
    )


def test_a_bus_that_qemu_lacks_is_refused_and_another_one_is_suggested(
    qemu: str, tmp_path: Path, machine: Spawned
) -> None:
    image = make_raw(tmp_path / "image", MIB)
    done = vmctl("attach-disk", machine.name, str(image), "--bus=nvme-ns")
    if done.returncode == 0:
        assert re.search(r"nvme0:\d+: /dev/disk/by-id/nvme-QEMU_NVMe_Ctrl_vmspawn_\d+$", done.stdout.strip())
        run("detach-disk", machine.name, "image")
        return
    assert "cannot plug in NVMe namespaces" in done.stderr
    assert "use bus nvme" in done.stderr


def test_a_pending_removal_is_shown_and_can_be_left_or_forced(qemu: str, tmp_path: Path) -> None:
    """On a terminal, the reason of the wait is shown. The test has its own machine: firmware releases no disk."""
    with idle(qemu, tmp_path) as machine:
        run("attach-disk", machine.name, str(make_raw(tmp_path / "data", MIB)))
        assert run("detach-disk", machine.name, "data", "--no-wait").startswith(
            "Detaching data: the guest has not released"
        )
        # The reason needs the full width.
        size = (24, 200)
        arguments = [*VMCTL[1:], "detach-disk", machine.name, "data", "--timeout=3"]
        terminal = pexpect.spawn(VMCTL[0], arguments, timeout=DEADLINE, encoding="utf-8", dimensions=size)
        terminal.expect(r"\d+ s, asked (once|\d+ times): the guest has not released data")
        terminal.expect("vmctl: cannot detach data: the guest has not released data")
        terminal.expect(pexpect.EOF)
        terminal.close()
        assert terminal.exitstatus == 1
        found = disk(machine, "data")
        assert (found["state"], found["removal"]["forced"]) == ("detaching", False)
        assert found["removal"]["requests"] >= 1
        said = run("detach-disk", machine.name, "data", "--force", "--timeout=0")
        assert said.startswith("Detached data by force: the image is closed.")
        assert disk(machine, "data")["removal"]["forced"] is True
        assert f"{tmp_path}/data" not in links_of(qemu_pid(machine.name))


def test_an_attach_can_wait_for_the_guest(machine: Spawned, tmp_path: Path) -> None:
    """A guest that is stopped takes no disk; the command reports that, and the disk stays."""
    image = make_raw(tmp_path / "awaited", MIB)
    run("pause", machine.name)
    try:
        done = vmctl("attach-disk", machine.name, str(image), "--bus=virtio-scsi", "--wait-guest", "--timeout=0.2")
    finally:
        run("resume", machine.name)
    assert done.returncode == 1
    assert "the guest has not used awaited within 0.2 s; the disk is attached" in done.stderr
    assert disk(machine, "awaited")["state"] == "attached"
    run("detach-disk", machine.name, "awaited")
