# SPDX-License-Identifier: LGPL-2.1-or-later
"""Runs machines that survive the death of their managers."""

import json
import os
import select
import signal
import socket
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

from tests.commands import Spawned, qemu_pid, vmctl, vmctl_output
from tests.conftest import make_raw
from tests.machines import fresh_name
from vmspawn.host import runtime


class Survivor:
    """A machine with one `vmspawn` process after another as its manager. `close` ends the machine and its manager."""

    def __init__(self, name: str, *arguments: str) -> None:
        self.name = name
        self.arguments = arguments
        self.manager = Spawned(name, arguments)
        self.manager.wait_for("is running")
        self.pid = qemu_pid(name)

    @property
    def folder(self) -> str:
        """The machine's runtime directory."""
        return os.path.join(runtime.runtime_root(), self.name)

    def kill_manager(self) -> None:
        """Kill the manager with SIGKILL, and wait until it is dead."""
        self.manager.process.kill()
        self.manager.process.wait()
        self.manager.close()

    def adopt(self, *arguments: str) -> None:
        """Start a manager that adopts the machine."""
        self.manager = Spawned(self.name, ("--adopt", "--console=headless", *arguments))
        self.manager.wait_for("is running")

    def kill_qemu(self) -> None:
        """Kill QEMU, and wait until it is dead."""
        os.kill(self.pid, signal.SIGKILL)
        wait_until_dead(self.pid)

    def attach(self, path: Path, *arguments: str) -> None:
        """Run `vmctl attach-disk`, which must succeed."""
        vmctl_output("attach-disk", self.name, str(path), *arguments)

    def disks(self) -> list[dict[str, Any]]:
        """Return the output of `vmctl list-disks`."""
        found: list[dict[str, Any]] = json.loads(vmctl_output("list-disks", self.name, "--json=short"))
        return found

    def monitor(self) -> "RawMonitor":
        """Connect to the manager's monitor, while there is no manager."""
        return RawMonitor(os.path.join(self.folder, "qmp-manager"))

    def close(self) -> None:
        """End the machine and its manager, and remove their files."""
        self.manager.close()
        if runtime.start_time(self.pid):
            self.kill_qemu()
        if os.path.exists(self.folder):
            vmctl("adopt", self.name)


@contextmanager
def survivor(name: str, *arguments: str) -> Iterator[Survivor]:
    """Start a machine whose managers may be killed, and end it on exit."""
    made = Survivor(name, *arguments)
    try:
        yield made
    finally:
        made.close()


def idle_survivor(qemu: str, folder: Path) -> AbstractContextManager[Survivor]:
    """Start a survivor that stays in its firmware, with four ports."""
    image = make_raw(folder / "boot", 1 << 20)
    options = (f"--qemu={qemu}", f"--image={image}", "--ram=64M", "--console=headless", "--hotplug-ports=4")
    return survivor(fresh_name(), *options)


class RawMonitor:
    """A blocking client of one of QEMU's monitors, without vmspawn's code."""

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(20)
        self._socket.connect(path)
        self._lines = self._socket.makefile("rb")
        assert "QMP" in json.loads(self._lines.readline())
        self.execute("qmp_capabilities")

    def execute(self, command: str, **arguments: Any) -> Any:
        """Run a command and return its reply. Events before the reply are skipped."""
        self._socket.sendall(json.dumps({"execute": command, "arguments": arguments}).encode())
        while True:
            message = json.loads(self._lines.readline())
            if "event" not in message:
                return message

    def close(self) -> None:
        """Disconnect."""
        self._lines.close()
        self._socket.close()

    def __enter__(self) -> "RawMonitor":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def wait_until_dead(pid: int) -> None:
    """Wait until a process that is not a child of this one has ended."""
    with suppress(ProcessLookupError):
        fd = os.pidfd_open(pid)
        try:
            assert select.select([fd], [], [], 20)[0], f"process {pid} has not ended"
        finally:
            os.close(fd)
