# SPDX-License-Identifier: LGPL-2.1-or-later
"""vmspawn: QEMU machines that you can plug disks into, share the QMP connection of, and end cleanly.

The names below are loaded when they are first used, for the commands must not import more than they need.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .boot.config import MachineConfig
    from .machine.ending import End
    from .machine.machine import Machine
    from .qmp.events import Event
    from .storage.disk import Disk

_HOMES = {
    "Disk": "storage.disk",
    "End": "machine.ending",
    "Event": "qmp.events",
    "Machine": "machine.machine",
    "MachineConfig": "boot.config",
}

__all__ = ["Disk", "End", "Event", "Machine", "MachineConfig"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
