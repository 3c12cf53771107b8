# SPDX-License-Identifier: LGPL-2.1-or-later
"""Refuses commands that save the device state while QEMU would crash on them.

QEMU 11.1 gets SIGSEGV when it saves an NVMe controller without a drive of its own. With namespaces it crashes until the
guest's firmware has enabled the controller, and reports an error after that (docs/qemu.md, "Faults"). QEMU 7.2 refuses
the save, and query-migrate reports that in advance.
"""

from __future__ import annotations

import re
from collections.abc import Generator
from typing import Any

import msgspec

from ..syntax.envelope import Command

#: Commands that can save the device state.
SAVERS = frozenset((b"migrate", b"snapshot-save", b"xen-save-devices-state", b"human-monitor-command"))

_HUMAN = re.compile(r"\s*(migrate|savevm)\b")

_QUERY = b'{"execute":"query-migrate"'
_FOLDERS = ("/machine/peripheral", "/machine/peripheral-anon")

#: A generator of questions to QEMU. It yields the body of a command, and is sent QEMU's result, or None for an error.
#: It returns the reason to refuse the command, or None.
Questions = Generator[bytes, Any, str | None]


def saves(command: Command) -> bool:
    """Return whether a command of SAVERS saves the device state."""
    if command.name != b"human-monitor-command":
        return True
    try:
        arguments = msgspec.json.decode(command.arguments or b"{}", type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False  # QEMU will report the error
    return _HUMAN.match(str(arguments.get("command-line", ""))) is not None


def questions(command: Command) -> Questions:
    """Find out whether QEMU would crash on a command that saves the device state."""
    migration = yield _QUERY
    if migration and migration.get("blocked-reasons"):
        return None  # QEMU refuses the command
    for folder in _FOLDERS:
        children = yield _qom(b"qom-list", {"path": folder})
        for name in [each["name"] for each in children or () if each.get("type") == "child<nvme>"]:
            drive = yield _qom(b"qom-get", {"path": f"{folder}/{name}", "property": "drive"})
            if drive == "":
                return _refusal(command, name)
    return None


def _qom(name: bytes, arguments: dict[str, str]) -> bytes:
    return b'{"execute":"%b","arguments":%b' % (name, msgspec.json.encode(arguments))


def _refusal(command: Command, device: str) -> str:
    return (
        f"The command {command.name.decode()} is refused: QEMU crashes when it saves the state of the NVMe controller "
        f"{device}, which has no drive of its own; detach the disks on bus nvme-ns, or unplug the controller"
    )
