# SPDX-License-Identifier: LGPL-2.1-or-later
"""Runs machines in the box."""

import json
from typing import Any

from tests.commands import Spawned
from tests.interop.box import Box
from tests.machines import fresh_name


class BoxedMachine(Spawned):
    """A vmspawn that runs in the box as a transient service, with systemd's records of it."""

    def __init__(self, box: Box, arguments: tuple[str, ...], *, unit: tuple[str, ...], name: str | None) -> None:
        self.box = box
        name = name or fresh_name()
        self.unit = f"test-{name}.service"
        options = ("--wait", "--pipe", f"--unit={self.unit}", *unit)
        super().__init__(name, arguments, program=box.command("vmspawn", unit=options))

    def terminate(self) -> bool:
        """End the machine without asking the guest. Returns whether the manager accepted."""
        return self.box.run("vmctl", "terminate", self.name, check=False).returncode == 0

    def machinectl(self, verb: str) -> None:
        """Run a verb of machinectl on the machine. It must succeed."""
        self.box.run("machinectl", verb, self.name)

    def call(self, method: str, parameters: str = "{}") -> dict[str, Any]:
        """Call a method on the machine's control socket by varlinkctl."""
        done = self.box.run("varlinkctl", "call", "--json=short", self.control, method, parameters)
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    @property
    def control(self) -> str:
        """Return the path of the control socket in the box."""
        return f"/run/vmspawn/{self.name}/control"

    def registration(self) -> dict[str, Any] | None:
        """Return machined's record of the machine, or None if it has none."""
        return machine_registration(self.box, self.name)


def machine_registration(box: Box, name: str) -> dict[str, Any] | None:
    """Return machined's record of a machine, or None if it has none."""
    done = box.run(
        *("varlinkctl", "call", "--json=short", "/run/systemd/machine/io.systemd.Machine", "io.systemd.Machine.List"),
        json.dumps({"name": name}),
        check=False,
    )
    if done.returncode != 0:
        assert "NoSuchMachine" in done.stderr, done.stderr
        return None
    found: dict[str, Any] = json.loads(done.stdout)
    return found
