# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests snapshots and copies of machines with disks of all kinds, by QEMU's devices and block nodes."""

import asyncio
import contextlib
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import ovmf
from tests.commands import vmctl, vmctl_output
from tests.conftest import make_qcow2, make_raw
from tests.copies import inner, is_part_of_snapshot, snapshot_paths
from tests.machines import Machine, fresh_name, idle_machine, is_gone, links_of
from tests.qemu.qmp_fixtures import wait_until
from tests.snapshots import names_of, saved, write
from vmspawn import Disk, Snapshot, connect
from vmspawn.api import machine as api
from vmspawn.boot.firmware import FirmwareWish
from vmspawn.cli.ctl.replies import MACHINE
from vmspawn.control import calls
from vmspawn.errors import (
    ConfigNotSupported,
    NoFreePort,
    QmpError,
    SnapshotBlocked,
    SnapshotExists,
    SnapshotInUse,
    StartError,
    SystemFailure,
    UsageError,
)
from vmspawn.host.runtime import CONSOLE
from vmspawn.images import snapshot_files
from vmspawn.snapshots import directory, same_host
from vmspawn.snapshots.save import save
from vmspawn.storage.limits import Limits


async def devices(machine: api.Machine) -> set[str]:
    found = await inner(machine).monitor.execute("qom-list", {"path": "/machine/peripheral"})
    return {each["name"] for each in found}


async def nodes(machine: api.Machine) -> dict[str, Any]:
    found = await inner(machine).monitor.execute("query-named-block-nodes", {"flat": True})
    return {each["node-name"]: each for each in found}


DISKS = [
    {"bus": "virtio-blk"},
    {"bus": "virtio-blk", "thread": True},
    {"bus": "virtio-blk", "cache": "none"},
    {"bus": "virtio-scsi"},
    {"bus": "virtio-scsi", "thread": True},
    {"bus": "virtio-scsi", "read_only": True},
    {"bus": "virtio-blk", "limits": Limits(iops=100)},
    {"bus": "scsi-cd"},
]


@pytest.mark.parametrize("options", DISKS, ids=lambda options: "-".join([options["bus"], *list(options)[1:]]))
@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
@pytest.mark.parametrize("machine_type", ["q35", "pc"])
async def test_a_copy_has_the_disk_at_its_place_and_can_detach_it(
    qemu: str, tmp_path: Path, machine_type: str, image_format: str, options: dict[str, Any]
) -> None:
    path = (make_raw if image_format == "raw" else make_qcow2)(tmp_path / "disk")
    async with idle_machine(qemu, tmp_path, machine_type=machine_type) as machine:
        attached = await machine.attach(Disk(str(path), format=image_format, **options))
        async with saved(machine) as snapshot:
            writable = not attached.read_only
            assert (await nodes(machine))[machine.disk("disk").images[0].chain[-1].top_node]["ro"]
            async with snapshot.fork() as copy:
                assert await devices(copy) == await devices(machine)
                found = next(each for each in await copy.disks() if each.disk.name == "disk")
                assert found.disk._replace(format=image_format) == attached
                assert found.limits == options.get("limits", Limits())
                assert found.disk.format == ("qcow2" if writable else image_format)
                # The guest would have to release a PCI device, and is only a firmware.
                if options["bus"] != "virtio-blk":
                    await copy.detach("disk")
                    assert not await has_open(copy, path)
            assert await has_open(machine, path)
            assert is_part_of_snapshot(path)
        assert [each.disk.name for each in await machine.disks()][-1] == "disk"


async def has_open(machine: api.Machine, path: Path) -> bool:
    """Return whether QEMU has a file open."""
    return str(path) in links_of(machine.pid)


async def test_an_empty_drive_is_empty_in_the_copy(qemu: str, tmp_path: Path) -> None:
    medium = make_raw(tmp_path / "medium")
    async with idle_machine(qemu, tmp_path) as machine:
        await machine.attach(Disk("", "drive", "scsi-cd"))
        async with saved(machine) as snapshot, snapshot.fork() as copy:
            assert next(each.size for each in await copy.disks() if each.disk.name == "drive") == 0
            await copy.insert_media("drive", str(medium))
            assert next(each.size for each in await copy.disks() if each.disk.name == "drive") == 64 << 20
            await copy.eject_media("drive")
            assert not await has_open(copy, medium)


async def test_overlays_of_a_copy_have_no_names_and_copies_of_copies_use_them(qemu: str, tmp_path: Path) -> None:
    path = make_raw(tmp_path / "disk")
    async with idle_machine(qemu, tmp_path) as machine:
        await machine.attach(Disk(str(path), bus="virtio-scsi"))
        async with saved(machine) as first:
            before = snapshot_paths()
            async with first.fork() as copy:
                assert snapshot_paths() == before
                second = await copy.snapshot()
                assert f"{copy.name}@{directory.CURRENT}" not in snapshot_files.names()
                async with second.fork() as third:
                    chain = inner(third).storage
                    disk = next(each for each in chain if each.name == "disk")
                    assert [image.path for image in disk.images[0].chain][-1] == str(path)
                    assert len(disk.images[0].chain) == 3
            await second.remove()
            assert snapshot_paths() == before


async def test_a_copy_whose_disks_were_kept_can_be_started_again(qemu: str, tmp_path: Path) -> None:
    path = make_raw(tmp_path / "disk")
    async with idle_machine(qemu, tmp_path) as machine:
        await machine.attach(Disk(str(path), bus="virtio-scsi"))
        async with saved(machine) as snapshot:
            name = fresh_name()
            async with snapshot.fork(name, keep_disks=True) as copy:
                assert any(each.path and each.path.endswith(".qcow2") for each in await copy.disks())
            current = Snapshot(f"{name}@{directory.CURRENT}", 0.0, 0)
            async with current.fork() as again:
                assert "disk" in [each.disk.name for each in await again.disks()]
            directory.remove(current.name)
            async with snapshot.fork(name, keep_disks=True) as copy:
                done = await run("detach-disk", name, "disk")
                assert f"it is never written to {path}, because this machine is a copy" in done
            directory.remove(current.name)


async def test_an_ephemeral_image_stays_unchanged_in_copies(qemu: str, tmp_path: Path) -> None:
    image = make_raw(tmp_path / "image", 1 << 20)
    source = idle_machine(qemu, tmp_path, image=str(image), ephemeral=True)
    async with source as machine, saved(machine) as snapshot, snapshot.fork() as copy:
        found = await nodes(copy)
        assert found["image-below"]["ro"]
        assert await has_open(copy, image)
        async with saved(copy) as second, second.fork() as third:
            assert "image-below" in await nodes(third)


async def test_the_image_of_an_ephemeral_machine_is_removed_with_its_last_snapshot(qemu: str, tmp_path: Path) -> None:
    """The image has no name but those in the snapshots' directories."""
    image, path = make_raw(tmp_path / "image", 1 << 20), make_raw(tmp_path / "disk")
    async with idle_machine(qemu, tmp_path, image=str(image), ephemeral=True) as machine:
        await machine.attach(Disk(str(path), "disk", "virtio-scsi"))
        first, second = await machine.snapshot(), await machine.snapshot()
        await write(machine, machine.disk("disk").device, 0)
        await second.remove()
    async with first.fork() as copy:
        assert "image-below" in await nodes(copy)
    await first.remove()
    assert not names_of(machine.name)
    assert path.read_bytes()[:4096] == b"\1" * 4096
    assert image.read_bytes() == bytes(1 << 20)


async def test_an_image_without_a_name_is_not_written_to_while_a_snapshot_needs_it(qemu: str, tmp_path: Path) -> None:
    image = make_raw(tmp_path / "image", 1 << 20)
    options = {"image": str(image), "ephemeral": True, "image_disk_type": "virtio-scsi"}
    async with idle_machine(qemu, tmp_path, **options) as machine:
        snapshot = await machine.snapshot()
        before = unnamed_image(snapshot)
        await write(machine, machine.disk("image").device, 0)
    assert f"{machine.name}@{directory.CURRENT}" in names_of(machine.name)
    assert unnamed_image(snapshot) == before
    await snapshot.remove()
    assert not names_of(machine.name)


def unnamed_image(snapshot: Snapshot) -> bytes:
    """Return the content of the machine's first image, which had no name before the snapshot."""
    return Path(directory.path_of(snapshot.name), "image0").read_bytes()


async def test_copies_of_an_ephemeral_machine_leave_nothing_behind(qemu: str, tmp_path: Path) -> None:
    image = make_raw(tmp_path / "image", 1 << 20)
    source = idle_machine(qemu, tmp_path, image=str(image), ephemeral=True)
    async with source as machine, machine.fork() as copy:
        assert copy.name
    assert not names_of(machine.name)


async def test_memory_in_a_file_is_mapped_by_copies_and_left_out_of_the_state(qemu: str, tmp_path: Path) -> None:
    # SeaBIOS prints to the serial port, so that the test sees that it has written to the memory.
    speaking = ("-machine", "graphics=off")
    async with idle_machine(qemu, tmp_path, ram_backing="file", qemu_arguments=speaking) as machine:
        reader, writer = await asyncio.open_unix_connection(machine.directory.file(CONSOLE))
        with contextlib.closing(writer):
            await asyncio.wait_for(reader.readuntil(b"SeaBIOS"), 60)
        await machine.pause()
        async with saved(machine) as snapshot:
            memory = memory_file(snapshot)
            assert state_size(snapshot) < 1 << 20
            assert snapshot.size > state_size(snapshot)
            before = memory.read_bytes()
            async with snapshot.fork() as copy:
                assert str(memory) in links_of(copy.pid)
                assert await low_memory(copy, tmp_path) == before[:_LOW_MEMORY]
                await copy.resume()
                await copy.reboot()
                # The copy's own snapshot has all of the memory, and needs no file of the first snapshot.
                async with saved(copy) as second, second.fork() as third:
                    assert third.name
                    assert str(memory) not in links_of(third.pid)
            assert memory.read_bytes() == before


async def test_a_machine_that_boots_from_the_newest_disks_has_memory_in_a_file_again(qemu: str, tmp_path: Path) -> None:
    async with idle_machine(qemu, tmp_path, ram_backing="file") as machine:
        snapshot = await machine.snapshot()
    async with Snapshot(f"{machine.name}@{directory.CURRENT}", 0.0, 0).fork() as booted:
        assert str(memory_file(snapshot)) not in links_of(booted.pid)
        async with saved(booted) as second:
            assert state_size(second) < 1 << 20
    await snapshot.remove()


def memory_file(snapshot: Snapshot) -> Path:
    """Return the file with the memory of a machine that has 64 MiB."""
    (found,) = (each for each in Path(directory.path_of(snapshot.name)).iterdir() if each.stat().st_size == 64 << 20)
    return found


def state_size(snapshot: Snapshot) -> int:
    return Path(directory.path_of(snapshot.name), "state").stat().st_size


#: The memory below the video memory, where the firmware has its data.
_LOW_MEMORY = 640 << 10


async def low_memory(machine: api.Machine, folder: Path) -> bytes:
    """Return the guest's low memory, which QEMU writes to a file."""
    path = folder / "memory"
    arguments = {"val": 0, "size": _LOW_MEMORY, "filename": str(path)}
    await inner(machine).monitor.execute("pmemsave", arguments)
    found = path.read_bytes()
    path.unlink()
    return found


async def test_an_adopted_machine_can_be_saved_and_copied(qemu: str, tmp_path: Path) -> None:
    path = make_raw(tmp_path / "disk")
    async with idle_machine(qemu, tmp_path) as machine:
        await machine.attach(Disk(str(path), bus="virtio-scsi"))
        await machine.leave()
        adopted = await Machine.adopt(machine.name)
        async with saved(adopted) as snapshot:
            async with snapshot.fork() as copy:
                assert await devices(copy) == await devices(adopted)
            await adopted.detach("disk")
        await adopted.terminate()
        await adopted.wait()
        await adopted.close()


async def test_a_copy_can_be_adopted(qemu: str, tmp_path: Path) -> None:
    path = make_raw(tmp_path / "disk")
    async with idle_machine(qemu, tmp_path) as machine:
        await machine.attach(Disk(str(path), bus="virtio-scsi"))
        async with saved(machine) as snapshot, snapshot.fork() as copy:
            await inner(copy).leave()
            adopted = await Machine.adopt(copy.name)
            assert adopted.inner.fork is not None
            assert adopted.inner.fork.snapshot == snapshot.name
            with pytest.raises(SnapshotInUse, match="a machine uses"):
                await snapshot.remove()
            await adopted.detach("disk")
            await adopted.terminate()
            await adopted.wait()
            await adopted.close()


async def test_changed_files_and_other_binaries_are_refused(
    qemu: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_raw(tmp_path / "disk")
    async with idle_machine(qemu, tmp_path) as machine:
        await machine.attach(Disk(str(path), bus="virtio-scsi"))
        async with saved(machine) as snapshot:
            content = change_binary(snapshot)
            with pytest.raises(StartError, match="has changed since"):
                await snapshot.fork().__aenter__()
            manifest_of(snapshot).write_text(content)
            modified = path.stat().st_mtime_ns
            path.touch()
            with pytest.raises(StartError, match="changed since"):
                await snapshot.fork().__aenter__()
            os.utime(path, ns=(modified, modified))


def manifest_of(snapshot: Snapshot) -> Path:
    return Path(directory.path_of(snapshot.name), snapshot_files.MANIFEST)


def change_binary(snapshot: Snapshot) -> str:
    """Change the manifest to another QEMU's; returns the former manifest."""
    content = manifest_of(snapshot).read_text()
    other = json.loads(content)
    other["qemu"]["mtime_ns"] += 1
    manifest_of(snapshot).write_text(json.dumps(other))
    return content


async def test_each_snapshot_of_a_machine_has_its_own_name(qemu: str, tmp_path: Path) -> None:
    async with idle_machine(qemu, tmp_path) as machine, saved(machine) as snapshot:
        name = snapshot.name.partition("@")[2]
        assert name == "1"
        for taken in (name, directory.CURRENT):
            with pytest.raises(SnapshotExists):
                await machine.snapshot(taken)
        with pytest.raises(UsageError):
            await machine.snapshot("a/b")
        assert (await machine.snapshot()).name == f"{machine.name}@2"


async def test_objects_of_sessions_block_a_save(qemu: str, tmp_path: Path) -> None:
    async with idle_machine(qemu, tmp_path) as machine:
        before = snapshot_paths()
        async with machine.qmp() as qmp:
            await qmp.execute("device_add", {"driver": "virtio-rng-pci", "id": "theirs", "bus": "port3"})
            with pytest.raises(SnapshotBlocked, match="device theirs"):
                await machine.snapshot()
            await qmp.execute("object-add", {"qom-type": "iothread", "id": "mine"})
            with pytest.raises(SnapshotBlocked, match="object mine"):
                await machine.snapshot()
        assert snapshot_paths() == before


async def test_a_disk_that_blocks_a_save_is_named(qemu: str, tmp_path: Path) -> None:
    path = make_raw(tmp_path / "disk")
    async with idle_machine(qemu, tmp_path) as machine:
        try:
            await machine.attach(Disk(str(path), bus="nvme-ns"))
        except (ConfigNotSupported, NoFreePort) as error:
            pytest.skip(f"this QEMU plugs in no namespaces: {error}")
        with pytest.raises(SnapshotBlocked, match="disk disk is on bus nvme-ns"):
            await machine.snapshot()


async def test_disks_can_be_resized_during_a_save_and_the_guest_keeps_its_state(qemu: str, tmp_path: Path) -> None:
    """QEMU 7.2 aborts if a disk is resized between a save and `cont`."""
    path = make_raw(tmp_path / "disk")
    async with idle_machine(qemu, tmp_path) as machine:
        await machine.attach(Disk(str(path), bus="virtio-scsi"))
        for paused in (False, True):
            if paused:
                await machine.pause()
            saving = asyncio.create_task(machine.snapshot())
            sizes = [await machine.resize("disk", size << 20) for size in range(65, 75)]
            assert sizes[-1] == 74 << 20
            await saving
            assert await machine.status() == ("paused" if paused else "running")
            await machine.resize("disk", 64 << 20, shrink=True)
        async with saved(machine) as snapshot, snapshot.fork() as copy:
            assert await copy.status() == "paused"


async def test_a_session_never_sees_the_save(qemu: str, tmp_path: Path) -> None:
    async with idle_machine(qemu, tmp_path) as machine, machine.qmp() as qmp, saved(machine):
        saving = asyncio.create_task(machine.snapshot())
        states = set()
        while not saving.done():
            states.add((await qmp.execute("query-status"))["status"])
            with pytest.raises(QmpError):
                await qmp.execute("blockdev-del", {"node-name": "nonesuch"})
        await saving
        assert states <= {"running"}


async def test_vmctl_saves_forks_lists_and_removes_snapshots(qemu: str, tmp_path: Path) -> None:
    """vmctl starts another manager for each copy."""
    path = make_raw(tmp_path / "disk")
    async with idle_machine(qemu, tmp_path, control=True) as machine:
        await machine.attach(Disk(str(path), bus="virtio-scsi"))
        names = [fresh_name() for _ in range(3)]
        done = await run("snapshot", machine.name, "s")
        assert done.startswith(f"Saved {machine.name}@s")
        assert f"{path} stays as it is" in done
        disks = json.loads(await run("list-disks", machine.name, "--json=short"))
        (disk,) = (each for each in disks if each["name"] == "disk")
        assert disk["path"].startswith(directory.path_of(f"{machine.name}@{directory.CURRENT}"))
        assert disk["backingFiles"] == [str(path)]
        refused = await asyncio.to_thread(vmctl, "attach-disk", machine.name, str(path), "--name=again")
        assert "is part of snapshot" in refused.stderr
        assert await run("fork", f"{machine.name}@s", *names)
        listed = json.loads(await run("list-snapshots", "--json=short", machine.name))
        forks = {each["name"]: each["forks"] for each in listed}
        assert sorted(forks[f"{machine.name}@s"]) == sorted(names)
        refused = await asyncio.to_thread(vmctl, "remove-snapshot", f"{machine.name}@s")
        assert (refused.returncode, "a machine uses" in refused.stderr) == (1, True)
        for name in names:
            assert json.loads(await run("status", name, "--json=short"))["status"] == "running"
            await run("terminate", name, "--wait")
        await run("remove-snapshot", f"{machine.name}@s")
        # A snapshot that was made for one copy is removed with the copy.
        started = json.loads(await run("fork", machine.name, "--json=short"))
        assert started["snapshot"] in snapshot_files.names()
        await run("terminate", started["machines"][0], "--wait")
        gone = lambda: started["snapshot"] not in snapshot_files.names()  # noqa: E731
        await asyncio.to_thread(wait_until, gone, "the snapshot's end")
        newest, other = machine.disk("disk").images[0].path, make_raw(tmp_path / "other")
        done = await run("replace-disk", machine.name, "disk", str(other))
        assert f"the newest data is in {newest}; it is written to {path}" in done
        await run("snapshot", machine.name, "t")
        newest = machine.disk("disk").images[0].path
        done = await run("detach-disk", machine.name, "disk")
        assert f"the newest data is in {newest}; it is written to {other}" in done
        await run("remove-snapshot", f"{machine.name}@t")
    assert not names_of(machine.name)
    assert not is_part_of_snapshot(path)


@contextlib.contextmanager
def obstructed(machine: str) -> Iterator[None]:
    """Make a directory for a copy's disks that cannot be cleaned, as only the copy's manager finds out."""
    folder = Path(directory.path_of(f"{machine}@{directory.CURRENT}"))
    (folder / "directory").mkdir(parents=True)
    try:
        yield
    finally:
        (folder / "directory").rmdir()
        folder.rmdir()


async def test_a_copy_that_cannot_start_does_not_hide_the_others(qemu: str, tmp_path: Path) -> None:
    """The other copies are named, and no copy starts if a name is known to be impossible."""
    async with idle_machine(qemu, tmp_path, control=True) as machine, saved(machine) as snapshot:
        good, bad = fresh_name(), fresh_name()
        await run("fork", snapshot.name, bad, "--keep")
        await run("terminate", bad, "--wait")
        refused = await asyncio.to_thread(vmctl, "fork", snapshot.name, good, bad, "--keep")
        assert refused.returncode == 1
        assert f"vmctl: {bad}@current has the disks of an earlier machine {bad}\n" in refused.stderr
        assert is_gone(good)
        directory.remove(f"{bad}@{directory.CURRENT}")
        with obstructed(bad):
            failed = await asyncio.to_thread(vmctl, "fork", snapshot.name, good, bad, "--keep")
        assert failed.returncode == 1
        assert f"cannot start {bad}: {bad}@current has the disks" in failed.stderr
        assert f"started nevertheless: {good};" in failed.stderr
        await run("terminate", good, "--wait")
        directory.remove(f"{good}@{directory.CURRENT}")


async def test_the_control_socket_saves_forks_lists_and_removes_snapshots(qemu: str, tmp_path: Path) -> None:
    async with idle_machine(qemu, tmp_path, control=True) as machine, connect(machine.name) as connected:
        await machine.attach(Disk(str(make_raw(tmp_path / "disk")), bus="virtio-scsi"))
        snapshot = await connected.snapshot("v")
        assert (snapshot.name, snapshot.size > 0) == (f"{machine.name}@v", True)
        name = fresh_name()
        reply = await calls.call(machine.name, f"{MACHINE}.Fork", {"names": [name], "keepDisks": True}, timeout=60)
        assert reply.parameters == {"machines": [name]}
        listed = (await calls.call(machine.name, f"{MACHINE}.ListSnapshots")).parameters["snapshots"]
        forks = {each["name"]: each["forks"] for each in listed}
        assert forks == {f"{machine.name}@v": [name], f"{machine.name}@{directory.CURRENT}": []}
        with pytest.raises(SnapshotInUse, match=f"{name}@{directory.CURRENT} is based on"):
            await calls.call(machine.name, f"{MACHINE}.RemoveSnapshot", {"name": "v"})
        await run("terminate", name, "--wait")
        # The copy's disks are based on the snapshot's, and were kept.
        assert f"{name}@{directory.CURRENT}" in snapshot_files.names()
        directory.remove(f"{name}@{directory.CURRENT}")
        await calls.call(machine.name, f"{MACHINE}.RemoveSnapshot", {"name": "v"})


async def test_each_disk_is_one_file_again_after_the_last_copy(qemu: str, tmp_path: Path) -> None:
    raw, qcow2 = make_raw(tmp_path / "raw"), make_qcow2(tmp_path / "qcow2")
    async with idle_machine(qemu, tmp_path) as machine:
        for path in (raw, qcow2):
            await machine.attach(Disk(str(path), bus="virtio-scsi", format=path.name))
        for number in range(2):
            made = await save(inner(machine), is_temporary=True)
            for path in (raw, qcow2):
                await write(machine, machine.disk(path.name).device, number)
            async with Snapshot(made.manifest.full_name, made.pause, 0).fork() as copy:
                assert await copy.status() == "running"
            assert made.manifest.full_name not in snapshot_files.names()
            assert raw.read_bytes()[:4096] == bytes(4096)
        assert f"{machine.name}@{directory.CURRENT}" in names_of(machine.name)
    assert not names_of(machine.name)
    for path in (raw, qcow2):
        for number in range(2):
            command = ["qemu-io", "-f", path.name, "-c", f"read -P {number + 1} {number << 16} 4k", str(path)]
            done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, check=True)
            assert "Pattern verification failed" not in done.stdout, done.stdout


async def test_overlays_that_cannot_be_written_are_reported_and_written_later(qemu: str, tmp_path: Path) -> None:
    path, moved = make_raw(tmp_path / "disk"), tmp_path / "moved"
    async with idle_machine(qemu, tmp_path) as machine:
        await machine.attach(Disk(str(path), bus="virtio-scsi"))
        snapshot = await machine.snapshot("s")
        await write(machine, machine.disk("disk").device, 0)
    path.rename(moved)
    with pytest.raises(SystemFailure, match=f"removed {machine.name}@s, but the disks of") as caught:
        await snapshot.remove()
    current = Snapshot(f"{machine.name}@{directory.CURRENT}", 0.0, 0)
    assert f"vmctl remove-snapshot {current.name}" in caught.value.hint
    done = await asyncio.to_thread(vmctl, "remove-snapshot", current.name)
    assert (done.returncode, f"the disks of {machine.name} stay on overlays" in done.stderr) == (1, True)
    moved.rename(path)
    assert is_part_of_snapshot(path)
    await current.remove()
    assert path.read_bytes()[:4096] == bytes([1]) * 4096
    assert not names_of(machine.name)


@pytest.mark.soak
async def test_a_copy_of_a_uefi_machine_has_its_own_variables(
    qemu: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copy needs the same firmware."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    ovmf.install(tmp_path / "config")
    options = {"firmware": FirmwareWish(kind="uefi"), "ram": 256 << 20}
    async with idle_machine(qemu, tmp_path, **options) as machine, saved(machine) as snapshot:
        variables = Path(f"{machine.config.image}.efinvramstate")
        firmware = json.loads(manifest_of(snapshot).read_text())["firmware"]
        assert firmware["sha256"] == same_host.hash_of(firmware["path"])
        content = await asyncio.to_thread(variables.read_bytes)
        for keep_disks in (False, True):
            async with snapshot.fork(keep_disks=keep_disks) as copy:
                assert await copy.status() == "running"
                assert await has_open(machine, variables)
                assert not await has_open(copy, variables)
                assert "firmware-variables" in await nodes(copy)
                async with saved(copy) as second, second.fork() as third:
                    assert await third.status() == "running"
                name = copy.name
        assert await asyncio.to_thread(variables.read_bytes) == content
        directory.remove(f"{name}@{directory.CURRENT}")
        text = manifest_of(snapshot).read_text()
        manifest_of(snapshot).write_text(text.replace(firmware["sha256"], "0" * 64))
        with pytest.raises(StartError, match="saved with another firmware"):
            await snapshot.fork().__aenter__()
        manifest_of(snapshot).write_text(text)


async def run(*arguments: str) -> str:
    """Run vmctl, which must succeed; returns its output."""
    return await asyncio.to_thread(vmctl_output, *arguments)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not wait long for the agent, which these guests do not have."""
    monkeypatch.setattr("vmspawn.inside.streams._SETTLE_TIMEOUT", 0.2)


@pytest.mark.usefixtures("impatient")
async def test_ports_of_commands_are_removed_from_the_copy(qemu: str, tmp_path: Path) -> None:
    """At first, the ports exist in the copy, because they are part of the saved state."""
    async with idle_machine(qemu, tmp_path) as machine:
        port = await machine._inside.commands._ports.attach("io.vmspawn.test")
        async with saved(machine) as snapshot, snapshot.fork() as copy:
            assert port.device in await devices(machine)
            assert port.device not in await devices(copy)
            async with saved(copy) as second, second.fork() as third:
                assert port.device not in await devices(third)


@pytest.mark.usefixtures("impatient")
async def test_ports_of_a_paused_copy_are_removed_when_its_guest_runs(qemu: str, tmp_path: Path) -> None:
    """QEMU crashes if the ports are removed before (docs/qemu.md, "Faults")."""
    async with idle_machine(qemu, tmp_path) as machine:
        port = await machine._inside.commands._ports.attach("io.vmspawn.test")
        await machine.pause()
        async with saved(machine) as snapshot, snapshot.fork() as copy:
            assert port.device in await devices(copy)
            await copy.resume()
            event = await copy.events.wait("DEVICE_DELETED", since=0)
            assert (event.data or {})["device"] == port.device
            assert await copy.status() == "running"


async def test_copies_start_after_their_source_has_ended(qemu: str, tmp_path: Path) -> None:
    path = make_raw(tmp_path / "disk")
    async with idle_machine(qemu, tmp_path) as machine:
        await machine.attach(Disk(str(path), bus="virtio-scsi"))
        snapshot = await machine.snapshot()
        await write(machine, machine.disk("disk").device, 0)
    async with snapshot.fork() as copy, snapshot.fork() as other:
        for each in (copy, other):
            assert "disk" in [disk.disk.name for disk in await each.disks()]
        await copy.detach("disk")
        assert path.read_bytes()[:4096] == bytes(4096)
    await snapshot.remove()
    # The data that the source wrote after the snapshot is on its own disk again.
    assert path.read_bytes()[:4096] == b"\1" * 4096
    assert not is_part_of_snapshot(path)
