# SPDX-License-Identifier: LGPL-2.1-or-later
"""Runs managers that kill themselves at a chosen step: `python -m tests.dying` carries out orders.

An order is a line: the machine's name, an operation, a number N, a moment, and the operation's arguments. The manager
dies `before` or `after` its Nth write of the state, or after QEMU has answered its Nth batch of commands (`command`).
The answer is `died` or `finished`. Each order runs in a new process, which is forked after all modules
were imported.
"""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from typing import Any

from tests.copies import inner
from tests.machines import Machine
from vmspawn import Disk, Snapshot
from vmspawn.host.runtime import MachineDirectory
from vmspawn.qmp.monitor import Monitor
from vmspawn.storage.limits import Limits


async def attach(machine: Machine, path: str, image_format: str = "raw") -> None:
    limits = Limits(iops=500) if image_format == "qcow2" else Limits()
    await machine.attach(Disk(path, "disk", "virtio-scsi", image_format, limits=limits))


async def attach_empty(machine: Machine) -> None:
    await machine.attach(Disk("", "disk", "scsi-cd"))


async def attach_threaded(machine: Machine, path: str) -> None:
    await machine.attach(Disk(path, "disk", "virtio-scsi", thread=True))


async def detach(machine: Machine) -> None:
    await machine.detach("disk")


async def force(machine: Machine) -> None:
    await machine.detach("disk", force=True)


async def replace(machine: Machine, path: str, image_format: str = "raw") -> None:
    await machine.replace("disk", path, format=image_format)


async def limit(machine: Machine, iops: str) -> None:
    await machine.limit("disk", Limits(iops=int(iops)))


async def insert(machine: Machine, path: str) -> None:
    await machine.insert_media("disk", path)


async def eject(machine: Machine) -> None:
    await machine.eject_media("disk")


async def snapshot(machine: Machine, name: str) -> None:
    await machine.snapshot(name)


async def fork(machine: Machine, snapshot: str, name: str) -> None:
    copy = await Snapshot(snapshot, 0.0, 0).fork(name).__aenter__()
    await inner(copy).leave()


OPERATIONS: dict[str, Callable[..., Awaitable[None]]] = {
    function.__name__: function
    for function in (
        *(attach, attach_empty, attach_threaded, detach, force, replace, limit, insert, eject),
        *(snapshot, fork),
    )
}


def die_at(count: int, when: str) -> None:
    """Die before or after the `count`th write of the state from now on, or after the `count`th batch of commands."""
    if when == "command":
        return die_after_commands(count)
    write = MachineDirectory.write
    left = count

    def counted(self: MachineDirectory, name: str, content: bytes) -> None:
        nonlocal left
        left -= 1
        if left == 0 and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        write(self, name, content)
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    MachineDirectory.write = counted  # type: ignore[method-assign]
    return None


def die_after_commands(count: int) -> None:
    """Die after QEMU has answered `count` batches of commands."""
    execute_all = Monitor.execute_all
    left = count

    async def counted(self: Monitor, *arguments: Any, **options: Any) -> list[Any]:
        nonlocal left
        replies = await execute_all(self, *arguments, **options)
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return replies

    Monitor.execute_all = counted  # type: ignore[method-assign]


async def manage(name: str, operation: str, count: int, when: str, arguments: list[str]) -> None:
    """Adopt a machine, and die during an operation."""
    machine = await Machine.adopt(name)
    die_at(count, when)
    await OPERATIONS[operation](machine, *arguments)
    await machine.leave()


class Dying:
    """The process that carries out the orders."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "tests.dying"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def order(self, *words: object) -> str:
        """Send an order, and wait for the manager's end."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(*words, file=self._process.stdin, flush=True)
        return self._process.stdout.readline().strip()

    def close(self) -> None:
        """End the process."""
        self._process.communicate(timeout=20)


def main() -> None:
    for line in sys.stdin:
        name, operation, count, when, *arguments = line.split()
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                asyncio.run(manage(name, operation, int(count), when, arguments))
                status = 0
            finally:
                os._exit(status)
        _, status = os.waitpid(pid, 0)
        outcomes = {-signal.SIGKILL: "died", 0: "finished"}
        print(outcomes.get(os.waitstatus_to_exitcode(status), f"status {status}"), flush=True)


if __name__ == "__main__":
    main()
