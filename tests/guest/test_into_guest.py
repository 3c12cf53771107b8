# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests that a booted guest finds its SMBIOS strings, credentials, UUID, memory and network card."""

import base64
import hashlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest_asyncio

from tests.machines import Machine, fresh_name
from tests.shell import Shell
from vmspawn.boot.credentials import Credential
from vmspawn.boot.memory import Growth
from vmspawn.guest.build import build
from vmspawn.guest.initramfs import Initramfs

UUID = "12345678-9abc-4def-8123-456789abcdef"
LARGE = bytes(range(256)) * 150
MIB = 1 << 20

STRINGS = "tr '\\0' '\\n' </sys/firmware/dmi/tables/DMI"


@pytest_asyncio.fixture
async def machine(qemu: str) -> AsyncIterator[Machine]:
    """Boot a guest with SMBIOS strings, credentials, a UUID, memory that can grow, and a network card."""
    async with Machine(
        qemu=qemu,
        guest="builtin",
        name=fresh_name(),
        console="headless",
        uuid=UUID,
        cpus=2,
        ram_growth=Growth(512 * MIB, 2),
        network_user=True,
        vendor_strings=("mine=a, b",),
        credentials=(Credential("small", b"\0value"), Credential("large", LARGE)),
    ) as running:
        yield running


async def test_the_guest_finds_what_it_was_given(machine: Machine) -> None:
    shell = await Shell.open(machine)
    try:
        assert await shell.run(f"{STRINGS} | grep -o mine=.*") == "mine=a, b"
        small = await shell.run(f"{STRINGS} | grep -o 'io.systemd.credential.binary:small=.*'")
        assert base64.b64decode(small.partition("=")[2]) == b"\0value"
        large = await shell.run(f"{STRINGS} | grep -o 'io.systemd.credential.binary:large=.*' | md5sum")
        line = b"io.systemd.credential.binary:large=" + base64.b64encode(LARGE) + b"\n"
        assert large.split()[0] == hashlib.md5(line).hexdigest()
        assert (await shell.run("cat /sys/class/dmi/id/product_uuid")).lower() == UUID
        assert await shell.run("grep -c ^processor /proc/cpuinfo") == "2"
        network = await shell.run("grep -l 0x020000 /sys/bus/pci/devices/*/class")
        assert await shell.run(f"cat {Path(network).parent}/vendor") == "0x1af4"
    finally:
        shell.close()
    memory = await machine.monitor.execute("query-memory-devices")
    assert memory == []
    await machine.monitor.execute("object-add", {"qom-type": "memory-backend-ram", "id": "more", "size": 128 * MIB})
    await machine.monitor.execute("device_add", {"driver": "pc-dimm", "id": "dimm0", "memdev": "more"})


async def test_several_initrds_are_passed_as_one(qemu: str, tmp_path: Path) -> None:
    guest = build()
    with (tmp_path / "more").open("wb") as file:
        more = Initramfs(file)
        more.add_file("from-the-second", b"hello")
        more.close()
    padding = tmp_path / "padding"
    padding.write_bytes(bytes(3))
    async with Machine(
        qemu=qemu,
        linux=guest.kernel,
        initrd=guest.initrd,
        more_initrds=(str(padding), str(tmp_path / "more")),
        kernel_arguments=guest.arguments,
        ram=256 * MIB,
        name=fresh_name(),
        console="headless",
    ) as running:
        shell = await Shell.open(running)
        assert await shell.run("cat /from-the-second") == "hello"
        shell.close()
