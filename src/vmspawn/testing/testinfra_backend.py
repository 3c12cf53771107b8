# SPDX-License-Identifier: LGPL-2.1-or-later
"""Connects testinfra to machines, without a network: `testinfra.get_host("vmspawn://NAME")`.

The pytest plugin registers this backend. A program without pytest must import this module.
"""

from __future__ import annotations

from typing import Any

from testinfra import backend
from testinfra.backend.base import BaseBackend, CommandResult

from .. import sync


class VmspawnBackend(BaseBackend):  # type: ignore[misc] # a base class without types
    """Runs testinfra's commands in the guest of a running machine: `vmspawn://[USER@]NAME`."""

    NAME = "vmspawn"

    def __init__(self, name: str, *args: Any, **options: Any) -> None:
        self.machine, self.user = self.parse_containerspec(name)
        super().__init__(self.machine, *args, **options)

    def run(self, command: str, *args: str, **_: Any) -> CommandResult:
        """Run a command line. Raises NotConnected if the machine does not run."""
        line = self.get_command(command, *args)
        with sync.connect(self.machine) as machine:
            done = machine.run(line, text=False, user=self.user)
        return self.result(done.status, self.encode(line), done.stdout, done.stderr)


backend.BACKENDS[VmspawnBackend.NAME] = f"{__name__}.{VmspawnBackend.__name__}"
