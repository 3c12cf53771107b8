# SPDX-License-Identifier: LGPL-2.1-or-later
"""Writes a machine's state.json before each change, so that another manager can adopt the machine.

The file is one JSON object. Members that stay the same while the machine runs are encoded once. The other members are
sections; each section has an owner, which returns the section's present value when the file is written.

This module is on the start path and imports next to nothing: the file is written before QEMU starts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from errno import EIO

from ..errors import SystemFailure
from ..host import runtime
from ..host.runtime import MachineDirectory


class Journal:
    """The only writer of a machine's state.json."""

    __slots__ = ("_constants", "_directory", "_sections")

    def __init__(self, directory: MachineDirectory, constants: Mapping[str, object]) -> None:
        """Make a journal without sections. `constants` are the members that stay the same."""
        self._directory: MachineDirectory | None = directory
        self._constants = json.dumps(constants)[:-1]
        self._sections: dict[str, Callable[[], str]] = {}

    @property
    def machine(self) -> str:
        """The machine's name; empty after `close`."""
        return self._directory.name if self._directory is not None else ""

    def add_section(self, name: str, text: Callable[[], str]) -> None:
        """Add or replace a section. Each write calls `text`, which returns the section's value in JSON."""
        self._sections[name] = text

    def section(self, name: str) -> str | None:
        """Return a section's present value in JSON, or None if the section does not exist."""
        text = self._sections.get(name)
        return text() if text is not None else None

    @property
    def section_names(self) -> tuple[str, ...]:
        """The names of all sections."""
        return tuple(self._sections)

    def write(self) -> None:
        """Write the file with the present values of all sections. Raises SystemFailure.

        Does nothing after `close`.
        """
        if self._directory is None:
            return
        sections = "".join(f', "{name}": {text()}' for name, text in self._sections.items())
        try:
            self._directory.write(runtime.STATE, f"{self._constants}{sections}}}".encode())
        except OSError as error:
            path = self._directory.file(runtime.STATE)
            raise SystemFailure(f"cannot write the machine's state to {path}", error.errno or EIO) from None

    def close(self) -> None:
        """Stop writing, because the machine has ended or another manager adopts it."""
        self._directory = None
