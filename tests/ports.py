# SPDX-License-Identifier: LGPL-2.1-or-later
"""Runs managers that manage only virtio-serial ports; one of them kills itself at a chosen point.

`python -m tests.ports MACHINE OPERATION POINT` adopts a machine's ports and does one operation. Points are before and
after each write of the journal, and after each command that QEMU has executed. The process dies at point number POINT,
and so leaves QEMU in the state after a truncated stream of commands. It prints `died` or `finished`.
"""

import asyncio
import os
import socket
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from vmspawn.host import runtime
from vmspawn.host.runtime import MachineDirectory
from vmspawn.hotplug.hotplug import Hotplug
from vmspawn.hotplug.journal import Journal
from vmspawn.inside.ports import Ports
from vmspawn.qmp.monitor import Command, Monitor
from vmspawn.qmp.run_state import RunState

CONTROLLER = "serial0"
#: Port 0 belongs to a virtio console. Two ports are few enough to run out.
NUMBERS = range(1, 3)
GUEST_NAME = "org.vmspawn.test"


class Manager:
    """A monitor, a journal, the hot-plug mechanism and ports. `managed` opens and closes a manager."""

    def __init__(self, directory: MachineDirectory, saved: dict[str, Any]) -> None:
        connected = socket.socket(socket.AF_UNIX)
        connected.connect(directory.socket_address("qmp-manager"))
        self.monitor = Monitor(connected)
        self.run_state = RunState(self.monitor)
        self.journal = Journal(directory, {"version": 3})
        self.hotplug = Hotplug(self.monitor, self.run_state, self.journal)
        self.ports = Ports(self.hotplug, CONTROLLER, NUMBERS, saved)

    async def seen(self) -> tuple[set[str], set[str]]:
        """Return the devices and the character devices of ports in QEMU."""
        devices = await self.monitor.execute("qom-list", {"path": "/machine/peripheral"})
        chardevs = await self.monitor.execute("query-chardev")
        return (
            {each["name"] for each in devices if each["name"].startswith("stream")},
            {each["label"] for each in chardevs if each["label"].startswith("stream")},
        )


@asynccontextmanager
async def managed(name: str) -> AsyncIterator[Manager]:
    """Adopt a machine's ports, and stop managing them on exit."""
    directory = MachineDirectory.take_over(name)
    try:
        manager = Manager(directory, runtime.read_state(directory.path))
        try:
            await manager.monitor.greeting()
            await manager.run_state.known()
            await manager.ports.settle()
            yield manager
        finally:
            manager.journal.close()
            manager.hotplug.close()
            manager.monitor.close()
    finally:
        directory.close()


class Points:
    """Counts points, and kills this process at the chosen one."""

    def __init__(self, count: int) -> None:
        self._left = count

    def passed(self) -> None:
        """Count a point."""
        self._left -= 1
        if self._left == 0:
            os.write(1, b"died\n")
            os.kill(os.getpid(), 9)


def die_at(count: int) -> None:
    """Die at the point with number `count`, counted from now."""
    points = Points(count)
    write, execute_all = Journal.write, Monitor.execute_all

    def counted_write(self: Journal) -> None:
        points.passed()
        write(self)
        points.passed()

    async def one_by_one(self: Monitor, commands: Sequence[Command], **options: Any) -> list[Any]:
        results = []
        for command in commands:
            results += await execute_all(self, [command], **options)
            points.passed()
        return results

    Journal.write = counted_write  # type: ignore[method-assign]
    Monitor.execute_all = one_by_one  # type: ignore[method-assign]


async def main(name: str, operation: str, count: int) -> None:
    async with managed(name) as manager:
        die_at(count)
        if operation == "attach":
            await manager.ports.attach(GUEST_NAME)
        elif operation == "connect":
            await manager.ports.connect(list(manager.ports))
        else:
            for port in manager.ports:
                await manager.ports.detach(port)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
    os.write(1, b"finished\n")
