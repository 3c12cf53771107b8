# SPDX-License-Identifier: LGPL-2.1-or-later
"""Provides blocking clients of the control socket."""

import array
import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

from tests.machines import Machine, idle_machine
from vmspawn.control.server import ControlServer, build_registry
from vmspawn.host.runtime import CONTROL
from vmspawn.inside.inside import Inside

INSTANCE = "io.systemd.MachineInstance"
DEADLINE = 60.0


class Caller:
    """A blocking client without a library, so that it can send invalid messages. Run it in a thread."""

    def __init__(self, machine: Machine) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(DEADLINE)
        self.socket.connect(machine.directory.file(CONTROL))
        self.buffer = b""

    def send(self, data: bytes, fds: list[int] | None = None) -> None:
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds or []))] if fds else []
        self.socket.sendmsg([data], ancillary)

    def reply(self) -> dict[str, Any]:
        while b"\0" not in self.buffer:
            data = self.socket.recv(65536)
            if not data:
                raise EOFError
            self.buffer += data
        message, _, self.buffer = self.buffer.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        return found

    def call(self, method: str, fds: list[int] | None = None, **parameters: Any) -> dict[str, Any]:
        self.send(json.dumps({"method": method, "parameters": parameters}).encode() + b"\0", fds)
        return self.reply()

    def is_closed(self) -> bool:
        try:
            return self.socket.recv(1) == b""
        except ConnectionResetError:
            return True


@contextlib.contextmanager
def caller(machine: Machine) -> Iterator[Caller]:
    client = Caller(machine)
    try:
        yield client
    finally:
        client.socket.close()


def ping(machine: Machine) -> Any:
    with caller(machine) as client:
        return client.call(f"{INSTANCE}.Describe")["parameters"]["status"]


async def in_thread(work: Any, *arguments: Any) -> Any:
    async with asyncio.timeout(60):
        return await asyncio.to_thread(work, *arguments)


@contextlib.asynccontextmanager
async def served_machine(qemu: str, folder: Path, **options: Any) -> AsyncIterator[Machine]:
    """Start a machine that stays in its firmware, and serve its control socket."""
    async with idle_machine(qemu, folder, **options) as running:
        server = ControlServer(running.directory, build_registry(running.inner, Inside(running.inner)))
        yield running
        server.close()
