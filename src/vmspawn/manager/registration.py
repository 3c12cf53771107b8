# SPDX-License-Identifier: LGPL-2.1-or-later
"""Registers a running machine with systemd-machined."""

from __future__ import annotations

from collections.abc import Callable

from ..host import machined
from ..host.machined import Candidate
from ..host.runtime import CONTROL
from ..machine.running import Running


class Registered:
    """The registration of one machine, from `begin` to `end`."""

    def __init__(self, machine: Running, notice: Callable[[str], None]) -> None:
        self._machine = machine
        self._notice = notice
        self._is_registered = False

    async def begin(self) -> None:
        """Register the machine. Raises StartError if it fails and the user requires it."""
        config = self._machine.config
        control = self._machine.directory.file(CONTROL)
        candidate = Candidate(self._machine.name, self._machine.pid, control, config.uuid, config.directory)
        self._is_registered = await machined.register(config.registration, candidate, self._notice)

    async def end(self) -> None:
        """Unregister the machine, if it is registered."""
        if self._is_registered:
            self._is_registered = False
            await machined.unregister(self._machine.config.registration, self._machine.name)
