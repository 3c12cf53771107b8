# SPDX-License-Identifier: LGPL-2.1-or-later
"""Refuses commands that are sure to crash this QEMU (docs/qemu.md, "Faults").

Each rule asks QEMU whether it has the fault, and whether the machine's state triggers it. A command that QEMU refuses
anyway is passed on, so that the client gets QEMU's own error.

1. QEMU 11.1 ends in SIGSEGV when it saves an NVMe controller that has no drive of its own. If the controller has
   namespaces, QEMU crashes only until the guest's firmware has enabled the controller; after that, the save fails.
2. QEMU 7.2 aborts when it resizes an image that is inactive: after a save, and before an incoming state has arrived.
3. QEMU 11.1 aborts when it is asked for the status of a virtio device.
4. QEMU aborts when a device's property `drive` is set to its present node.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Mapping
from typing import Any

import msgspec

from ..inactive import MIGRATION_STATES, is_inactive
from ..saving import Saving
from ..syntax.envelope import Command

#: A generator of questions to QEMU. It yields the body of a command, and is sent QEMU's result, or None for an error.
#: It returns the reason to refuse the command, or None.
Questions = Generator[bytes, Any, str | None]

_HUMAN_SAVE = re.compile(r"\s*(migrate|savevm)\b")
_HUMAN_STATUS = re.compile(r"\s*info\s+virtio-status\b")
_HUMAN_SET = re.compile(r"\s*qom-set\b")

_CONTAINERS = ("/machine/peripheral", "/machine/peripheral-anon")

#: A member of x-query-virtio-status's result that all releases with the fault have. Sessions also refuse the command
#: if a release has the member, but not the fault.
_ABORT_MARKER = "unknown-dev-features2"


def is_save(command: Command) -> bool:
    """Return whether a command of RULES saves the machine's state."""
    if command.name == b"human-monitor-command":
        return bool(_HUMAN_SAVE.match(_human_line(_arguments(command) or {})))
    return RULES[command.name] is _saving


def questions(command: Command, saving: Saving) -> Questions:
    """Find out whether QEMU would crash on a command of RULES. Before a save, the caller has called `saving.begin`."""
    arguments = _arguments(command)
    if arguments is None:
        return None  # QEMU will report the error
    problem = yield from RULES[command.name](arguments, saving)
    return problem and f"The command {command.name.decode()} is refused: {problem}"


def _arguments(command: Command) -> dict[str, Any] | None:
    """Return the command's arguments, or None if they are not valid."""
    try:
        return msgspec.json.decode(command.arguments or b"{}", type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def _human_line(arguments: Mapping[str, Any]) -> str:
    return str(arguments.get("command-line", ""))


def _saving(arguments: Mapping[str, Any], saving: Saving) -> Questions:
    migration = yield b'{"execute":"query-migrate"'
    if migration and migration.get("blocked-reasons"):
        return None  # QEMU refuses the command
    if saving.is_device_coming:
        return "an attach on bus nvme-ns is under way, and QEMU crashes when it saves the controller; try again"
    for container in _CONTAINERS:
        children = yield _ask("qom-list", path=container)
        for name in [each["name"] for each in children or () if each.get("type") == "child<nvme>"]:
            drive = yield _ask("qom-get", path=f"{container}/{name}", property="drive")
            if drive == "":
                return (
                    f"QEMU crashes when it saves the state of the NVMe controller {name}, which has no drive of its "
                    "own; detach the disks on bus nvme-ns, or unplug the controller"
                )
    return None


def _resizing(arguments: Mapping[str, Any], saving: Saving) -> Questions:
    status = yield b'{"execute":"query-status"'
    if not status or status["status"] not in MIGRATION_STATES:
        return None
    migration = yield b'{"execute":"query-migrate"'
    nodes = yield _ask("query-named-block-nodes", flat=True)
    if not is_inactive(status["status"], migration or {}) or any("active" in node for node in nodes or ()):
        return None  # a QEMU that knows which nodes are active refuses it
    return (
        f"QEMU aborts when it resizes an image that is inactive, because the guest is {status['status']}; "
        "resume it first"
    )


def _virtio_status(arguments: Mapping[str, Any], saving: Saving) -> Questions:
    schema = yield b'{"execute":"query-qmp-schema"'
    members = (member["name"] for entry in schema or () for member in entry.get("members", ()) if "name" in member)
    if _ABORT_MARKER not in members:
        return None
    return "this QEMU aborts on it; see the guest's own /sys/bus/virtio for the state of its drivers"


def _setting(arguments: Mapping[str, Any], saving: Saving) -> Questions:
    path, value = arguments.get("path"), arguments.get("value")
    if arguments.get("property") != "drive" or not isinstance(path, str) or not isinstance(value, str):
        return None
    current = yield _ask("qom-get", path=path, property="drive")
    if not value or current != value:
        return None
    return f"QEMU aborts when it sets drive to {value}, the node that the device has"


def _human(arguments: Mapping[str, Any], saving: Saving) -> Questions:
    """Apply the rules to a command of QEMU's human monitor."""
    line = _human_line(arguments)
    if _HUMAN_SAVE.match(line):
        return (yield from _saving({}, saving))
    if _HUMAN_STATUS.match(line):
        return (yield from _virtio_status({}, saving))
    if _HUMAN_SET.match(line):
        words = [word.strip("\"'") for word in line.split()]
        return (yield from _setting(dict(zip(("path", "property", "value"), words[1:], strict=False)), saving))
    return None


#: By command, the rule that decides on it.
RULES: dict[bytes, Callable[[Mapping[str, Any], Saving], Questions]] = {
    b"migrate": _saving,
    b"snapshot-save": _saving,
    b"xen-save-devices-state": _saving,
    b"block_resize": _resizing,
    b"x-query-virtio-status": _virtio_status,
    b"qom-set": _setting,
    b"human-monitor-command": _human,
}


def _ask(name: str, **arguments: Any) -> bytes:
    return b'{"execute":"%b","arguments":%b' % (name.encode(), msgspec.json.encode(arguments))
