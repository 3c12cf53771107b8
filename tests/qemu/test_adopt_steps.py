# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests that the next manager repairs a disk, whichever step of an operation a manager dies at."""

import asyncio
import dataclasses
import os
from pathlib import Path

import pytest

from tests import dying
from tests.conftest import make_qcow2, make_raw
from tests.dying import Dying
from tests.machines import Machine, Resources, adopted, end_adopted, idle_machine, links_of
from vmspawn.hotplug.attachment import State
from vmspawn.hotplug.places import THREADED_SCSI_CONTROLLER
from vmspawn.storage.attached_disk import AttachedDisk
from vmspawn.storage.limits import Limits

#: More steps than any operation has.
STEPS_MAX = 60


# The operations before, and the operation during which the manager dies. Their arguments are files of `make_files`.
SCENES = [
    ("", "attach raw1"),
    ("", "attach qcow1 qcow2"),
    ("", "attach_empty"),
    ("", "attach_threaded raw1"),
    ("attach raw1", "detach"),
    ("attach qcow1 qcow2", "detach"),
    ("attach raw1", "force"),
    ("attach raw1", "replace raw2"),
    ("attach raw1", "replace large"),
    ("attach raw1", "replace qcow1 qcow2"),
    ("attach qcow1 qcow2", "replace raw1"),
    ("attach raw1", "limit 100"),
    ("attach qcow1 qcow2", "limit 100"),
    ("attach qcow1 qcow2", "limit 0"),
    ("attach_empty", "insert raw1"),
    ("attach_empty; insert raw1", "insert raw2"),
    ("attach_empty; insert raw1", "eject"),
]


@pytest.mark.parametrize(("before", "doing"), SCENES, ids=lambda scene: scene.replace(" ", "-"))
async def test_a_disk_is_repaired_after_its_manager_died_at_any_step(
    qemu: str, tmp_path: Path, doomed: Dying, before: str, doing: str
) -> None:
    make_files(tmp_path)
    async with idle_machine(qemu, tmp_path) as machine:
        name, pid = machine.name, machine.pid
        await machine.multiplexer()
        await machine.leave()
        try:
            async with adopted(name) as first:
                clean = await Resources.of(first)
            for when in ("before", "after"):
                await die_at_each_step(doomed, name, tmp_path, before, doing, when, clean)
        finally:
            async with adopted(name) as last:
                await last.terminate()
                await last.wait()
                assert last.pid == pid


async def test_an_adoption_reports_whether_an_interrupted_attach_had_a_device(
    qemu: str, tmp_path: Path, doomed: Dying
) -> None:
    """Nothing proves that an empty optical drive is complete, so its attach is undone although QEMU has its device."""
    async with idle_machine(qemu, tmp_path) as machine:
        name = machine.name
        await machine.multiplexer()
        await machine.leave()
        try:
            for when, note in (
                ("after", "disk has no device in QEMU; its remains are removed"),
                ("command", "the attach of disk was interrupted; it is undone"),
            ):
                assert await asyncio.to_thread(doomed.order, name, "attach_empty", 1, when) == "died"
                async with adopted(name) as second:
                    assert second.adoption_notes == [note]
                    await settle(second)
        finally:
            await end_adopted(name)


async def test_an_adoption_truncates_no_image_that_has_grown(qemu: str, tmp_path: Path, doomed: Dying) -> None:
    """The adoption resizes the disk to its image, which may have grown since."""
    make_files(tmp_path)
    paths = [tmp_path / "raw1", tmp_path / "raw2"]
    async with idle_machine(qemu, tmp_path) as machine:
        name = machine.name
        await machine.multiplexer()
        await machine.leave()
        try:
            for step in range(1, STEPS_MAX):
                async with adopted(name) as first:
                    await carry_out(first, tmp_path, "attach raw1")
                outcome = await asyncio.to_thread(doomed.order, name, *order("replace raw2", step, "after", tmp_path))
                size = (64 << 20) + step * 4096
                for path in paths:
                    os.truncate(path, size)
                async with adopted(name) as second:
                    await settle(second)
                    assert [path.stat().st_size for path in paths] == [size, size], f"step {step}"
                    await second.detach("disk")
                if outcome == "finished":
                    return
            raise AssertionError("replace never came to its end")
        finally:
            await end_adopted(name)


async def die_at_each_step(
    doomed: Dying, name: str, folder: Path, before: str, doing: str, when: str, clean: Resources
) -> None:
    for step in range(1, STEPS_MAX):
        async with adopted(name) as machine:
            for operation in filter(None, before.split("; ")):
                await carry_out(machine, folder, operation)
        outcome = await asyncio.to_thread(doomed.order, name, *order(doing, step, when, folder))
        assert outcome in ("died", "finished")
        async with adopted(name) as machine:
            await settle(machine)
            await agrees_with_qemu(machine, folder)
            for each in machine.storage:
                if not each.is_boot:
                    await machine.detach(each.name)
            assert await resources(machine) == clean, f"{doing}, step {step}, {when}: {machine.adoption_notes}"
        if outcome == "finished":
            return
    raise AssertionError(f"{doing} never came to its end")


def make_files(folder: Path) -> None:
    for number in (1, 2):
        make_raw(folder / f"raw{number}")
        make_qcow2(folder / f"qcow{number}")
    make_raw(folder / "large", 96 << 20)


def order(doing: str, step: int, when: str, folder: Path) -> list[object]:
    operation, *arguments = doing.split()
    return [operation, step, when, *(words(folder, arguments))]


def words(folder: Path, arguments: list[str]) -> list[str]:
    """Return the arguments of an operation. The first one is replaced by a path if it names a file."""
    return [str(folder / word) if number == 0 and not word.isdigit() else word for number, word in enumerate(arguments)]


async def carry_out(machine: Machine, folder: Path, text: str) -> None:
    operation, *arguments = text.split()
    await dying.OPERATIONS[operation](machine, *words(folder, arguments))


async def settle(machine: Machine) -> None:
    """Wait until pending operations have ended."""
    for each in machine.storage:
        if each.unwinding is not None:
            await asyncio.wait({each.unwinding}, timeout=20)
            assert each.unwinding.done(), f"the removal of {each.name} did not end: {machine.adoption_notes}"


async def agrees_with_qemu(machine: Machine, folder: Path) -> None:
    """Check that the register and QEMU agree about nodes, files, limits and media."""
    disks = [each for each in machine.storage if not each.is_boot]
    assert all(each.state is State.ATTACHED for each in disks)
    nodes = await machine.monitor.execute("query-named-block-nodes", {"flat": True})
    boot = {name for each in machine.storage if each.is_boot for name in expected_nodes(each)}
    assert {node["node-name"] for node in nodes} - boot == {name for each in disks for name in expected_nodes(each)}
    files = {os.path.basename(each.image.path) for each in disks if each.image}
    assert files_of(machine.pid, folder) == files
    for each in disks:
        assert len(each.images) <= 1
        assert await limits_of(machine, each) == each.limits
        if each.image and each.disk.bus != "scsi-cd":
            sizes = await machine.sizes()
            assert sizes[each.name] == (96 << 20 if each.image.path.endswith("large") else 64 << 20)


def expected_nodes(attachment: AttachedDisk) -> set[str]:
    found = set()
    for image in attachment.images:
        found |= {attachment.identifiers.pivot, image.file_node, image.top_node}
    return found


def files_of(pid: int, folder: Path) -> set[str]:
    """Return the files of the directory that a process has open, except its boot image."""
    found = {os.path.basename(link) for link in links_of(pid) if os.path.dirname(link) == str(folder)}
    return {name for name in found if not name.startswith("boot")}


async def limits_of(machine: Machine, attachment: AttachedDisk) -> Limits:
    objects = await machine.monitor.execute("qom-list", {"path": "/objects"})
    group = attachment.identifiers.limits
    if not any(each["name"] == group for each in objects):
        return Limits()
    arguments = {"path": f"/objects/{group}", "property": "limits"}
    return Limits.from_qemu(await machine.monitor.execute("qom-get", arguments))


async def resources(machine: Machine) -> Resources:
    """Return the resources without the SCSI controller with an I/O thread, kept for the next disk that needs it."""
    found = await Resources.of(machine)
    planned = machine.storage._context.controllers.place_of(THREADED_SCSI_CONTROLLER) is not None
    assert (THREADED_SCSI_CONTROLLER in found.pci_devices) is planned
    devices = found.pci_devices - {THREADED_SCSI_CONTROLLER}
    return dataclasses.replace(found, pci_devices=devices, ports_free=found.ports_free + planned)
