# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests inserting and ejecting media in an optical drive that exists from boot, as for an installer."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.conftest import MIB
from tests.machines import Machine
from tests.shell import Booted, booted
from vmspawn import Disk
from vmspawn.errors import StoragePending

pytestmark = pytest.mark.asyncio(loop_scope="module")


def make_medium(path: Path, text: bytes) -> Path:
    path.write_bytes(text.ljust(MIB, b"\0"))
    return path


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def guest(qemu: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Booted]:
    medium = make_medium(tmp_path_factory.mktemp("media") / "first", b"first medium\n")
    disks = (Disk(str(medium), "installer", "scsi-cd"),)
    async with booted(qemu, extra_disks=disks) as running:
        yield running


@pytest_asyncio.fixture(loop_scope="module", autouse=True)
async def nothing_left(guest: Booted) -> AsyncIterator[None]:
    """Check that the number of nodes and descriptor sets does not change. Their names change with each medium."""

    async def counts() -> tuple[int, int]:
        nodes = await guest.machine.monitor.execute("query-named-block-nodes", {"flat": True})
        return len(nodes), len(await guest.machine.monitor.execute("query-fdsets"))

    before = await counts()
    yield
    assert await counts() == before


def first_medium(machine: Machine) -> str:
    image = next(each for each in machine.storage if each.name == "installer").image
    assert image is not None
    return image.path


async def test_media_are_ejected_and_inserted_as_for_an_installer(guest: Booted, tmp_path: Path) -> None:
    """The medium is present at boot, is ejected, and another one is inserted."""
    machine, shell = guest
    first = first_medium(machine)
    second = make_medium(tmp_path / "second", b"second medium\n")
    assert await shell.run("head -n 1 /dev/sr0") == "first medium"
    await machine.eject_media("installer")
    await shell.run("! head -n 1 /dev/sr0 2>/dev/null")
    await machine.insert_media("installer", str(second))
    assert await shell.run("head -n 1 /dev/sr0") == "second medium"
    await machine.insert_media("installer", first)
    assert await shell.run("head -n 1 /dev/sr0") == "first medium"


async def test_a_tray_that_the_guest_has_locked_opens_only_by_force(guest: Booted) -> None:
    machine, shell = guest
    first = first_medium(machine)
    await shell.run("exec 3</dev/sr0")
    with pytest.raises(StoragePending, match="has locked the tray of installer") as caught:
        await machine.storage.changes.eject_media("installer", timeout=0.2)
    assert "force=True" in caught.value.hint
    assert await shell.run("head -n 1 /dev/sr0") == "first medium"
    await machine.eject_media("installer", force=True)
    await shell.run("exec 3<&-")
    await machine.insert_media("installer", first)
    assert await shell.run("head -n 1 /dev/sr0") == "first medium"


async def test_a_reset_unlocks_the_tray_without_an_event(guest: Booted) -> None:
    """This test must be the last in the file, because the reset ends the shell."""
    machine, shell = guest
    first = first_medium(machine)
    await shell.run("exec 3</dev/sr0")
    ejecting = asyncio.create_task(machine.storage.changes.eject_media("installer", timeout=30))
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(asyncio.shield(ejecting), 0.3)
    await machine.reboot()
    await ejecting
    await machine.insert_media("installer", first)
