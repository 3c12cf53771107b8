# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is done inside the guest of one machine. It is loaded when it is first asked for: many machines never are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..machine.running import Running

if TYPE_CHECKING:
    from .commands import Commands

#: The section of the journal with the ports of commands.
_PORTS = "ports"


class Inside:
    """The inside of one machine."""

    def __init__(self, machine: Running) -> None:
        self._machine = machine
        self._commands: Commands | None = None

    @property
    def commands(self) -> Commands:
        """The commands in the guest. Raises NotSupported if the machine has no port for the agent."""
        if self._commands is None:
            from .commands import Commands

            self._commands = Commands(self._machine)
        return self._commands

    async def settle(self) -> None:
        """End the commands of a manager that died. Raises Timeout or NotConnected."""
        if self._machine.attachments.get(_PORTS, {}).get("attachments"):
            await self.commands.settle()

    def close(self) -> None:
        """Let go of the agent and all commands. May be called again."""
        if self._commands is not None:
            self._commands.close()
