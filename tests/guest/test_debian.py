# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests an unmodified Debian.

It boots by BIOS and by UEFI, from raw and qcow2 images and from a directory. Its udev finds hot-plugged disks. The
power button shuts it down.
"""

import asyncio
import hashlib
import re
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests import debian, ovmf, uki
from tests.conftest import make_raw
from tests.machines import Machine, fresh_name
from vmspawn import Disk
from vmspawn.boot import nvram
from vmspawn.boot.credentials import Credential
from vmspawn.boot.shares import Share
from vmspawn.host.notify import Notifier
from vmspawn.host.runtime import CONSOLE
from vmspawn.manager.shutdown import Shutdown

pytestmark = [pytest.mark.soak, pytest.mark.timeout(900)]

#: Seconds under emulation on a busy host.
BOOT_TIMEOUT = 400.0
SHUTDOWN_TIMEOUT = 180.0
COMMAND_TIMEOUT = 120.0

#: Credentials with which systemd's getty logs root in without a password. The login shows that credentials arrive.
LOGIN = (Credential("agetty.autologin", b"root"), Credential("login.noauth", b"yes"))

PROMPT = r"root@[^\n]*# "


@pytest.fixture(autouse=True)
def _needs() -> None:
    debian.need()


class Console:
    """A shell on the guest's console."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self.text = ""

    async def wait_for(self, pattern: str, timeout: float) -> None:
        """Read until the pattern matches, and consume the output up to the end of the match."""
        try:
            async with asyncio.timeout(timeout):
                while not (match := re.search(pattern, self.text)):
                    data = await self._reader.read(65536)
                    assert data, f"the console ended before {pattern!r}: {self.text[-2000:]!r}"
                    self.text += data.decode(errors="replace").replace("\r", "")
        except TimeoutError:
            raise AssertionError(f"the guest did not print {pattern!r}: {self.text[-3000:]!r}") from None
        self.text = self.text[match.end() :]

    async def run(self, command: str) -> str:
        """Run a command, which must succeed, and return its output."""
        self._writer.write(f"{command}; echo sta''tus=$?=\n".encode())
        async with asyncio.timeout(COMMAND_TIMEOUT):
            while not (match := re.search(r"status=(\d+)=\n", self.text)):
                self.text += (await self._reader.read(65536)).decode(errors="replace").replace("\r", "")
        output, self.text = self.text[: match.start()], self.text[match.end() :]
        assert match[1] == "0", f"{command!r} failed: {output!r}"
        return re.sub(r"\x1b\[[^a-zA-Z]*[a-zA-Z]", "", output).strip()

    def close(self) -> None:
        self._writer.close()


@asynccontextmanager
async def booted(qemu: str, **options: Any) -> AsyncIterator[tuple[Machine, Console]]:
    """Boot a Debian to root's shell."""
    # One processor: with several, a kernel that patches its code sometimes crashes under QEMU 7.2's emulation.
    defaults = {"name": fresh_name(), "console": "headless", "ram": 1 << 30, "cpus": 1, "credentials": LOGIN}
    defaults["shutdown_timeout"] = SHUTDOWN_TIMEOUT
    async with Machine(qemu=qemu, **{**defaults, **options}) as machine:
        console = Console(*await asyncio.open_unix_connection(machine.directory.file(CONSOLE)))
        await console.wait_for(PROMPT, BOOT_TIMEOUT)
        # Late messages of the kernel must not mix with the output of commands.
        await console.run("dmesg --console-level emerg")
        await console.run("stty -echo cols 500; bind 'set enable-bracketed-paste off' 2>/dev/null; PS1=")
        yield machine, console
        console.close()


async def power_off(machine: Machine) -> None:
    """Press the power button until the guest powers off, as SIGTERM makes vmspawn do: logind may miss a press."""
    shutdown = Shutdown(machine.inner, lambda line: None, Notifier())
    shutdown.request("the test")
    try:
        async with asyncio.timeout(2 * SHUTDOWN_TIMEOUT):
            end = await machine.wait()
    finally:
        shutdown.close()
    assert (end.reason, end.clean) == ("guest-shutdown", True)


def checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def make_copy(path: Path) -> Path:
    """Make a copy of the disk in qcow2 format."""
    subprocess.run(["qemu-img", "convert", "-O", "qcow2", str(debian.disk()), str(path)], check=True)
    return path


def make_shared(folder: Path) -> Path:
    """Make a directory with a file named hello."""
    folder.mkdir()
    (folder / "hello").write_text("from the host")
    return folder


async def test_bios_boots_debian_and_udev_finds_hot_plugged_disks(qemu: str, tmp_path: Path) -> None:
    image = debian.disk()
    before = checksum(image)
    async with booted(qemu, image=str(image), ephemeral=True, kernel_arguments=("not.for=bios",)) as (machine, console):
        assert await console.run("findmnt -no FSTYPE /") == "ext4"
        for bus in ("virtio-blk", "nvme", "virtio-scsi"):
            disk = make_raw(tmp_path / f"disk-{bus}")
            attached = await machine.attach(Disk(str(disk), bus=bus))
            await console.run(f"udevadm wait --timeout=60 {attached.by_id}")
            device = await console.run(f"readlink -f {attached.by_id}")
            assert await console.run(f"blockdev --getsize64 {device}") == str(disk.stat().st_size)
            await machine.detach(disk.name)
            await console.run(f"udevadm wait --removed --timeout=60 {attached.by_id}")
        await power_off(machine)
    assert checksum(image) == before


async def test_uefi_boots_a_qcow2_with_kernel_arguments(
    qemu: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ovmf.install(tmp_path / "config")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    image = make_copy(tmp_path / "debian.qcow2")
    shared = make_shared(tmp_path / "shared")
    async with booted(
        qemu,
        image=str(image),
        image_format="qcow2",
        kernel_arguments=("of.mine=1",),
        credentials=(*LOGIN, Credential("large", bytes(70_000)), Credential("fstab.extra", b"none /mnt/b tmpfs rw\n")),
        binds=(Share(str(shared), "/mnt/a"),),
    ) as (machine, console):
        assert "of.mine=1" in (await console.run("cat /proc/cmdline")).split()
        assert await console.run("ls -d /sys/firmware/efi") == "/sys/firmware/efi"
        assert await console.run("wc -c </run/credentials/@system/large") == "70000"
        assert await console.run("cat /mnt/a/hello") == "from the host"
        assert await console.run("findmnt -no FSTYPE /mnt/b") == "tmpfs"
        await power_off(machine)
    assert image.with_name(image.name + nvram.SUFFIX).stat().st_size > 0


async def test_a_users_kernel_finds_its_root_on_the_image(qemu: str) -> None:
    linux, initrd = debian.kernel()
    options = {"linux": str(linux), "initrd": str(initrd), "image": str(debian.disk()), "ephemeral": True}
    async with booted(qemu, **options, kernel_arguments=("rw",)) as (machine, console):
        assert "root=PARTUUID=" in await console.run("cat /proc/cmdline")
        assert await console.run("findmnt -no FSTYPE /") == "ext4"
        await power_off(machine)


async def test_a_unified_kernel_image_is_started_by_uefi(
    qemu: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ovmf.install(tmp_path / "config")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    tree = debian.tree()
    stub = tree / "usr/lib/systemd/boot/efi/linuxx64.efi.stub"
    image = uki.make_uki(tmp_path / "uki.efi", stub, *debian.kernel(), tree / "usr/lib/os-release")
    arguments = (f"root=LABEL={debian.LABEL}", "rw", "of.mine=1")
    options = {"linux": str(image), "image": str(debian.disk()), "ephemeral": True, "kernel_arguments": arguments}
    async with booted(qemu, **options) as (machine, console):
        assert "of.mine=1" in (await console.run("cat /proc/cmdline")).split()
        assert await console.run("ls -d /sys/firmware/efi") == "/sys/firmware/efi"
        await power_off(machine)


async def test_debian_boots_from_a_directory(qemu: str) -> None:
    async with booted(qemu, directory=str(debian.tree())) as (machine, console):
        assert await console.run("findmnt -no FSTYPE /") == "virtiofs"
        await power_off(machine)
