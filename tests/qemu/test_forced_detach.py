# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests forced detaches, by which the host gets its file back at once, storage that hangs, and cancelled attaches."""

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.commands import DEADLINE
from tests.conftest import MIB, make_qcow2, make_raw
from tests.machines import Resources, detach_by_reset, event_named, idle_machine, unchanged
from tests.qemu.qmp_fixtures import wait_until
from tests.qemu.storage_model import open_images
from vmspawn import Disk
from vmspawn.errors import NoSuchStorage, StoragePending, Timeout

pytestmark = pytest.mark.asyncio(loop_scope="module")

BUSES = ("virtio-blk", "nvme", "virtio-scsi")


@pytest.mark.parametrize("machine_type", ["q35", "pc"])
@pytest.mark.parametrize("bus", BUSES)
@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
async def test_force_gives_the_host_its_file_back_at_once(
    qemu: str, tmp_path: Path, machine_type: str, bus: str, image_format: str
) -> None:
    """Firmware does not release a PCI device; yet the image is closed, and can be attached again at once.

    The test has its own machine, because a firmware that was reset resets itself once more, some time later.
    """
    path = (make_raw if image_format == "raw" else make_qcow2)(tmp_path / "image", 4 * MIB)
    async with idle_machine(qemu, tmp_path, machine_type=machine_type) as machine:
        before = await Resources.of(machine)
        await machine.attach(Disk(str(path), "disk", bus, image_format))
        await machine.detach("disk", timeout=0, force=True)
        assert "image" not in open_images(machine.pid, tmp_path)
        if bus != "virtio-scsi":
            assert [(each.state.value, each.is_forced) for each in machine.storage if not each.is_boot] == [
                ("detaching", True)
            ]
            with pytest.raises(StoragePending, match="disk is detaching"):
                await machine.resize("disk", 8 * MIB)
            with pytest.raises(StoragePending, match="disk is detaching"):
                await machine.replace("disk", str(make_raw(tmp_path / "other", MIB)))
            await machine.attach(Disk(str(path), "again", "virtio-scsi", image_format))
            await machine.detach("again")
            # A second request changes nothing; neither does `force` again.
            assert await machine.detach("disk", timeout=0.1, force=True) is False
            await machine.reboot()
        with contextlib.suppress(NoSuchStorage):
            await machine.detach("disk", timeout=20)
        assert await Resources.of(machine) == before


async def test_the_pending_removal_of_a_cancelled_attach_has_events(qemu: str, tmp_path: Path) -> None:
    """A device that QEMU plugs in after the cancellation is removed only when the guest releases it."""
    async with idle_machine(qemu, tmp_path) as machine, unchanged(machine):
        detaching, detached = (
            asyncio.create_task(event_named(machine, name, timeout=DEADLINE))
            for name in ("StorageDetaching", "StorageDetached")
        )
        attaching = asyncio.create_task(machine.attach(Disk(str(make_raw(tmp_path / "disk")), bus="virtio-blk")))
        async with asyncio.timeout(DEADLINE):
            # When the attach has entered its steps, it has sent their commands.
            while not any(each.done for each in machine.storage if not each.is_boot):  # noqa: ASYNC110 - nothing reports it
                await asyncio.sleep(0)
        attaching.cancel()
        with pytest.raises(asyncio.CancelledError):
            await attaching
        assert (await detaching)["name"] == "disk"
        await detach_by_reset(machine, "disk")
        assert await detached == {"name": "disk"}


@pytest.mark.soak
async def test_a_detach_from_storage_that_hangs_times_out_and_completes_later(qemu: str, tmp_path: Path) -> None:
    """QEMU hangs while it closes the file, or while it queries the size if the host has dropped that from its cache.

    Clients get the error before their own timeouts, and the detach continues by itself.
    """
    async with idle_machine(qemu, tmp_path) as machine:
        with fuse_file(tmp_path) as (path, server):
            async with unchanged(machine):
                await machine.attach(Disk(path, "disk", "virtio-scsi"))
                server.send_signal(signal.SIGSTOP)
                stuck = r"did not answer (blockdev-del|query-named-block-nodes) within 20 s"
                with pytest.raises(Timeout, match=stuck) as caught:
                    await machine.detach("disk", force=True)
                assert "the image's storage may hang" in caught.value.hint
                detached = asyncio.create_task(event_named(machine, "StorageDetached"))
                await asyncio.sleep(0)
                server.send_signal(signal.SIGCONT)
                assert await detached == {"name": "disk"}


@contextlib.contextmanager
def fuse_file(folder: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Serve a file by a process; skips the test if no program can."""
    if not shutil.which("qemu-storage-daemon") or not os.access("/dev/fuse", os.W_OK):
        pytest.skip("needs qemu-storage-daemon and FUSE")
    image, path = make_raw(folder / "served", MIB), folder / "file"
    path.touch()
    node = f"driver=file,node-name=image,filename={image}"
    export = f"type=fuse,id=file,node-name=image,mountpoint={path},writable=on"
    pid_file = folder / "pid"
    command = ["qemu-storage-daemon", f"--blockdev={node}", f"--export={export}", f"--pidfile={pid_file}"]
    server = subprocess.Popen(command)
    try:
        wait_until(pid_file.exists, "the start of qemu-storage-daemon")
        yield str(path), server
    finally:
        server.send_signal(signal.SIGCONT)
        server.terminate()
        server.wait(20)
