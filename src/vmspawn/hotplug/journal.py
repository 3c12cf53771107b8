# SPDX-License-Identifier: LGPL-2.1-or-later
"""state.json of one machine: what another manager needs to take the machine over, written ahead of whatever changes it.

The file is one JSON object. What stays the same while the machine runs is put into JSON once; the rest are sections,
each with an owner that says what is true at the moment of a write.

On the start path, for it is written before QEMU is started: imports next to nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from errno import EIO

from ..errors import SystemFailure
from ..host import runtime
from ..host.runtime import MachineDirectory


class Journal:
    """The one writer of state.json."""

    __slots__ = ("_constants", "_directory", "_sections")

    def __init__(self, directory: MachineDirectory, constants: Mapping[str, object]) -> None:
        """`constants` are the members that never change."""
        self._directory: MachineDirectory | None = directory
        self._constants = json.dumps(constants)[:-1]
        self._sections: dict[str, Callable[[], str]] = {}

    @property
    def machine(self) -> str:
        """The machine's name; empty after `close`."""
        return self._directory.name if self._directory is not None else ""

    def add_section(self, name: str, text: Callable[[], str]) -> None:
        """Add a section, or give it another owner. `text` returns its value in JSON, at each write."""
        self._sections[name] = text

    def write(self) -> None:
        """Write all sections; they are on the disk when this returns. Raises SystemFailure.

        Does nothing after `close`.
        """
        if self._directory is None:
            return
        sections = "".join(f', "{name}": {text()}' for name, text in self._sections.items())
        try:
            self._directory.write(runtime.STATE, f"{self._constants}{sections}}}".encode())
        except OSError as error:
            path = self._directory.file(runtime.STATE)
            raise SystemFailure(f"cannot write down what is about to be done ({path})", error.errno or EIO) from None

    def close(self) -> None:
        """Write nothing any more: the machine belongs to another manager, or has ended."""
        self._directory = None
