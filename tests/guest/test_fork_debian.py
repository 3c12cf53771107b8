# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests copies of a Debian that has booted, by a kernel and by UEFI, and compares their start with a boot."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from tests import debian, ovmf
from tests.conftest import make_raw
from tests.figures import figure
from tests.guest.test_exec_debian import BOOT_TIMEOUT, ROOT, booted
from vmspawn import Disk

pytestmark = [pytest.mark.soak, pytest.mark.timeout(1800)]


def boot_options(how: str, folder: Path, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Return the options that boot a Debian."""
    if how == "kernel":
        linux, initrd = debian.kernel()
        image = debian.root(folder / "root", debian.tree())
        return {"image": str(image), "linux": str(linux), "initrd": str(initrd), "kernel_arguments": ROOT}
    ovmf.install(folder / "config")
    patch.setenv("XDG_CONFIG_HOME", str(folder / "config"))
    return {}


@pytest.mark.parametrize("how", ["kernel", "uefi"])
@pytest.mark.asyncio
async def test_a_copy_of_a_debian_continues_from_its_state(
    qemu: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    debian.need()
    options = boot_options(how, tmp_path, monkeypatch)
    begun = time.perf_counter()
    async with booted(qemu, **options) as machine:
        await machine.run("true", check=True, timeout=BOOT_TIMEOUT)
        boot = time.perf_counter() - begun
        disk = await machine.attach(Disk(str(make_raw(tmp_path / "disk")), "disk", "virtio-scsi"))
        wait = f"udevadm wait --timeout=60 {disk.by_id} && echo saved >{disk.by_id} && sync"
        await machine.run(wait, check=True, timeout=BOOT_TIMEOUT)
        identity = "cat /proc/sys/kernel/random/boot_id; systemctl is-system-running"
        before = (await machine.run(identity)).stdout
        snapshot = await machine.snapshot()
        starts = []
        for _ in range(3):
            begun = time.perf_counter()
            async with snapshot.fork() as copy:
                await copy.run("true", check=True, timeout=BOOT_TIMEOUT)
                starts.append(time.perf_counter() - begun)
                assert (await copy.run(identity)).stdout == before
                found = await copy.run(f"head -n 1 {disk.by_id}; systemctl restart systemd-journald", check=True)
                assert found.stdout == "saved\n"
        ratio = sorted(starts)[1] / boot
        figure(f"Debian by {how}: boot, copy until its first command has answered", f"{boot:.1f} s, {ratio:.3f} of it")
        figure(f"Debian by {how}: pause of the save", f"{snapshot.pause:.2f} s")
        await snapshot.remove()
