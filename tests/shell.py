# SPDX-License-Identifier: LGPL-2.1-or-later
"""Types commands on the built-in guest's console, and reads their output and the guest's messages."""

import asyncio
import contextlib
import re
import shutil
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

import pytest

from tests.machines import Machine, fresh_name
from vmspawn.host.runtime import CONSOLE

#: Seconds within which the guest must boot. It takes three under emulation on an idle host.
BOOT_TIMEOUT = 60.0
COMMAND_TIMEOUT = 30.0

READY = "vmspawn-guest: ready"

#: The guest's own messages, which may come at any time, even amid a command's output.
_SAID = re.compile(r"^vmspawn-guest: .*\n", re.MULTILINE)


class Shell:
    """The console of one machine. `text` is all output; each wait begins after the previous match."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._position = 0
        self._count = 0
        self.text = ""

    @classmethod
    async def open(cls, machine: Machine) -> "Shell":
        """Connect to a headless machine's console and wait until the guest is up."""
        return await cls.connect(machine.directory.file(CONSOLE))

    @classmethod
    async def connect(cls, path: str) -> "Shell":
        """Connect to a console by its path, and wait until the guest is up."""
        reader, writer = await asyncio.open_unix_connection(path)
        shell = cls(reader, writer)
        await shell.wait_for(READY, timeout=BOOT_TIMEOUT)
        # The kernel's messages about failing disks would come amid a line.
        await shell.run("stty -echo; PS1=; echo 1 >/proc/sys/kernel/printk")
        return shell

    async def reconnect(self, path: str) -> None:
        """Read the old connection to its end, then connect to the console of the same guest at another manager."""
        async with asyncio.timeout(COMMAND_TIMEOUT):
            with contextlib.suppress(ConnectionError):
                while data := await self._reader.read(65536):
                    self._take(data)
        self._writer.close()
        self._reader, self._writer = await asyncio.open_unix_connection(path)

    async def wait_for(self, pattern: str, *, timeout: float = COMMAND_TIMEOUT) -> re.Match[str]:
        """Wait until the guest prints text that matches a regular expression, after the previous match."""
        expression = re.compile(pattern)
        try:
            async with asyncio.timeout(timeout):
                while not (match := expression.search(self.text, self._position)):
                    data = await self._reader.read(65536)
                    assert data, f"the console ended before {pattern!r}: {self.text[-2000:]!r}"
                    self._take(data)
        except TimeoutError:
            raise AssertionError(f"the guest did not print {pattern!r}: {self.text[-2000:]!r}") from None
        self._position = match.end()
        return match

    def _take(self, data: bytes) -> None:
        self.text += data.decode(errors="replace").replace("\r", "")

    async def run(self, command: str, *, timeout: float = COMMAND_TIMEOUT) -> str:
        """Run a command in the guest, which must succeed. Returns its output without the guest's own messages."""
        self._count += 1
        mark = f"done-{self._count}"
        # The start of the last line, which may be an unfinished message of the guest. Complete messages are removed.
        start = self.text.rfind("\n") + 1
        # The mark is typed in two pieces, so that the echo of the command does not match it.
        self._writer.write(f'{command}; echo "done"-{self._count}-$?\n'.encode())
        match = await self.wait_for(rf"{mark}-(\d+)\n", timeout=timeout)
        output = _SAID.sub("", self.text[start : match.start()])
        assert match[1] == "0", f"{command!r} failed in the guest: {output!r}"
        return output.strip()

    def close(self) -> None:
        """Disconnect."""
        self._writer.close()


class Booted(NamedTuple):
    """A machine with the booted built-in guest, and its console."""

    machine: Machine
    shell: Shell


def qemu_for(machine_type: str, qemu: str) -> str:
    """Return the QEMU for a machine type: for aarch64, the one in the same directory."""
    if machine_type != "virt":
        return qemu
    beside = qemu.replace("qemu-system-x86_64", "qemu-system-aarch64")
    if not shutil.which(beside):
        pytest.skip(f"there is no {beside}")
    return beside


@contextlib.asynccontextmanager
async def booted(qemu: str, **options: Any) -> AsyncIterator[Booted]:
    """Start the built-in guest with a headless console. With `warm`, it is a copy of a guest that has booted."""
    async with Machine(guest="builtin", qemu=qemu, name=fresh_name(), console="headless", **options) as machine:
        shell = await Shell.open(machine)
        try:
            yield Booted(machine, shell)
        finally:
            shell.close()
