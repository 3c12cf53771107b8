# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests starting the built-in guest from a snapshot of a booted guest."""

import asyncio
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.commands import vmspawn
from tests.conftest import make_raw
from tests.copies import everything_below
from tests.machines import fresh_name
from vmspawn import Machine
from vmspawn.cache import cache_directory
from vmspawn.guest.build import build
from vmspawn.host import runtime
from vmspawn.images.snapshot_files import MANIFEST

#: Prints a line of the kernel's log with its time in microseconds, which is equal only in copies of the same guest.
WHEN_BOOTED = "dmesg | grep 'Run /init'"


@pytest.fixture(scope="module", autouse=True)
def warm_directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Make a cache with the built-in guest and without warm snapshots. Yields the directory for warm snapshots."""
    build()
    folder = tmp_path_factory.mktemp("cache")
    for name in ("guest", "agent"):
        os.symlink(os.path.join(cache_directory(), name), folder / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VMSPAWN_CACHE_DIR", str(folder))
        yield folder / "warm"


def warm(qemu: str) -> Machine:
    return Machine(guest="builtin", warm=True, qemu=qemu, name=fresh_name(), console="headless")


def warm_snapshots(folder: Path) -> list[Path]:
    return [each.parent for each in folder.glob(f"*/{MANIFEST}")]


async def test_machines_that_start_at_the_same_time_share_one_boot(
    qemu: str, warm_directory: Path, tmp_path: Path
) -> None:
    async def use(machine: Machine) -> str:
        async with machine:
            await machine.console.expect("vmspawn-guest: ready", timeout=10)
            disk = await machine.attach(make_raw(tmp_path / machine.name), wait_guest=True)
            done = await machine.run(
                f"until [ -b {disk.by_id} ]; do usleep 10000; done; cat /proc/sys/kernel/random/uuid", check=True
            )
            assert abs(int((await machine.run("date +%s")).stdout) - time.time()) < 60
            return done.stdout

    found = await asyncio.gather(*(use(warm(qemu)) for _ in range(3)))
    assert len(set(found)) == 3
    (made,) = warm_snapshots(warm_directory)
    assert not [each for each in everything_below(str(warm_directory)) if each.startswith(".")]
    assert not [each for each in runtime.machine_names() if each.startswith("warm-")]

    # A warm snapshot that cannot be used is made again.
    (made / MANIFEST).write_text("{}")
    async with warm(qemu) as machine:
        boot = (await machine.run(WHEN_BOOTED, check=True)).stdout
        snapshot = await machine.snapshot()
        async with snapshot.fork() as fork:
            await fork.run("true", check=True)
        await snapshot.remove()
    assert warm_snapshots(warm_directory) == [made]

    # `vmspawn --warm` starts from a warm snapshot too.
    options = ("--guest=builtin", "--warm", f"--qemu={qemu}", f"--machine={fresh_name()}")
    done = await asyncio.to_thread(vmspawn, *options, f"--run={WHEN_BOOTED}; exit 7")
    assert (done.returncode, done.stdout, done.stderr) == (7, boot, "")


def kill_while_it_boots(qemu: str) -> None:
    """Start a machine whose warm snapshot does not exist yet, and kill the process while the guest boots."""
    options = ("--guest=builtin", "--warm", "--console=headless", f"--qemu={qemu}", f"--machine={fresh_name()}")
    with subprocess.Popen([sys.executable, "-m", "vmspawn", *options], stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 60
        while not any(each.startswith("warm-") for each in runtime.machine_names()):
            assert process.poll() is None, "vmspawn ended before it booted a guest for the warm snapshot"
            assert time.monotonic() < deadline, "no guest boots for the warm snapshot"
            time.sleep(0.01)
        process.kill()


async def test_a_start_waits_for_a_boot_whose_starter_was_killed(qemu: str, warm_directory: Path) -> None:
    for each in warm_snapshots(warm_directory):
        shutil.rmtree(each)
    await asyncio.to_thread(kill_while_it_boots, qemu)
    async with warm(qemu) as machine:
        await machine.run("true", check=True)
    assert len(warm_snapshots(warm_directory)) == 1
    assert not [each for each in everything_below(str(warm_directory)) if each.startswith(".")]
