# SPDX-License-Identifier: LGPL-2.1-or-later
"""Runs a QEMU with one monitor, to which the test connects without vmspawn, for facts about QEMU itself."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.qemu.qmp_fixtures import Client, Machine

#: q35 with two empty root ports, and pc with its PCI bus. Both have a SCSI controller.
MACHINES = {
    "q35": (
        *("-machine", "q35", "-accel", "tcg", "-m", "64"),
        *("-device", "pcie-root-port,id=port0,chassis=1,slot=0", "-device", "pcie-root-port,id=port1,chassis=2,slot=1"),
        *("-device", "virtio-scsi-pci,id=scsi0"),
    ),
    "pc": ("-machine", "pc", "-accel", "tcg", "-m", "64", "-device", "virtio-scsi-pci,id=scsi0"),
}


class Monitor(Client):
    """A client of QEMU's own monitor. Keeps the events that come before a reply."""

    def __init__(self, connected: socket.socket, machine: Machine) -> None:
        super().__init__(connected)
        self.machine = machine
        self.events: list[dict[str, Any]] = []

    def message(self) -> dict[str, Any]:
        message = super().message()
        if "event" in message:
            self.events.append(message)
        return message

    def succeed(self, command: str, *, fds: Sequence[int] = (), **arguments: Any) -> Any:
        """Run a command that must succeed; returns its result."""
        reply = self.run(command, fds=fds, **arguments)
        assert "return" in reply, f"{command}: {reply}"
        return reply["return"]

    def fail(self, command: str, **arguments: Any) -> str:
        """Run a command that must fail; returns the description of the error."""
        reply = self.run(command, **arguments)
        assert "error" in reply, f"{command}: {reply}"
        return str(reply["error"]["desc"])

    def event(self, name: str) -> dict[str, Any]:
        """Return the data of the next event with this name, and forget the events up to it."""
        while True:
            while self.events:
                event = self.events.pop(0)
                if event["event"] == name:
                    return dict(event.get("data", {}))
            self.message()

    def add_file(self, path: Path, node: str, **options: Any) -> None:
        """Add a file node."""
        self.succeed("blockdev-add", driver="file", node_name=node, filename=str(path), **options)

    def nodes(self) -> dict[str, dict[str, Any]]:
        """Return the block nodes by name."""
        return {each["node-name"]: each for each in self.succeed("query-named-block-nodes", flat=True)}

    def open_files(self) -> set[str]:
        """Return the paths that QEMU has open."""
        folder = f"/proc/{self.machine.process.pid}/fd"
        return {os.readlink(f"{folder}/{fd}") for fd in os.listdir(folder)}


@contextmanager
def bare(qemu: str, machine_type: str, *arguments: str) -> Iterator[Monitor]:
    """Start QEMU without running its guest, and connect to its monitor."""
    with Machine(qemu, 1, (*MACHINES[machine_type], *arguments)) as machine:
        monitor = Monitor(machine.connect(0), machine)
        monitor.negotiate()
        try:
            yield monitor
        finally:
            monitor.close()
