# SPDX-License-Identifier: LGPL-2.1-or-later
"""Generates hostile input: valid, almost valid and invalid messages."""

import json
import random
from collections.abc import Callable
from typing import Any

#: Methods that do not end the machine, and do not change the answers to other clients.
METHODS = (
    "org.varlink.service.GetInfo",
    "org.varlink.service.GetInterfaceDescription",
    "io.systemd.MachineInstance.Describe",
    "io.systemd.MachineInstance.SubscribeEvents",
    "io.systemd.MachineInstance.AddStorage",
    "io.systemd.MachineInstance.RemoveStorage",
    "io.systemd.MachineInstance.ReplaceStorage",
    "io.systemd.QemuMachineInstance.AcquireQMP",
    "io.vmspawn.Machine.Describe",
    "io.vmspawn.Machine.ListStorage",
    "io.vmspawn.Machine.AttachStorage",
    "io.vmspawn.Machine.DetachStorage",
    "io.vmspawn.Machine.ReplaceStorage",
    "io.vmspawn.Machine.ResizeStorage",
    "io.vmspawn.Machine.LimitStorage",
    "io.vmspawn.Machine.InsertMedia",
    "io.vmspawn.Machine.EjectMedia",
    "io.vmspawn.Machine.ListSessions",
    "io.vmspawn.Machine.Nonsense",
    "",
)

_FIELDS = (
    "name",
    "fileDescriptorIndex",
    "bus",
    "format",
    "config",
    "readOnly",
    "serial",
    "path",
    "limits",
    "sizeBytes",
    "timeoutUSec",
    "force",
    "filter",
    "interface",
    "statistics",
    "x",
)

COMMANDS = (
    "query-status",
    "query-block",
    "query-named-block-nodes",
    "query-fdsets",
    "query-version",
    "getfd",
    "closefd",
    "add-fd",
    "remove-fd",
    "qom-list",
    "qom-get",
    "qmp_capabilities",
    "nonsense",
    "",
)

_ARGUMENTS = ("fdname", "fdset-id", "opaque", "path", "property", "flat", "enable", "x")

_TEXTS = ("", "x", "../../etc", "a" * 300, "\0", "é😀", "null", "virtio-blk", "scsi-cd", "raw", "qcow2", "hostile", "/")


def value(choices: random.Random, depth: int = 0) -> Any:
    """Return a random JSON value."""
    match choices.randrange(9 if depth < 4 else 6):
        case 0:
            return None
        case 1:
            return choices.random() < 0.5
        case 2:
            return choices.choice((0, 1, -1, 2**31, 2**63, -(2**63), 10**30, choices.randrange(1 << 40)))
        case 3:
            return choices.choice((0.5, -1e300, 1e-300))
        case 4 | 5:
            return choices.choice(_TEXTS)
        case 6:
            return [value(choices, depth + 1) for _ in range(choices.randrange(4))]
        case _:
            return {choices.choice(_FIELDS): value(choices, depth + 1) for _ in range(choices.randrange(4))}


def call(choices: random.Random) -> bytes:
    """Return a Varlink call that is not always valid."""
    message: dict[str, Any] = {"method": choices.choice(METHODS)}
    if choices.random() < 0.9:
        fields = {choices.choice(_FIELDS): value(choices) for _ in range(choices.randrange(5))}
        message["parameters"] = fields if choices.random() < 0.95 else value(choices)
    for flag in ("more", "oneway", "upgrade"):
        if choices.random() < 0.1:
            message[flag] = choices.choice((True, False, None, 1, "yes"))
    if choices.random() < 0.05:
        message[choices.choice(_TEXTS)] = value(choices)
    return mutate(choices, json.dumps(message, ensure_ascii=choices.random() < 0.5).encode()) + b"\0"


def command(choices: random.Random) -> bytes:
    """Return a QMP command that is not always valid."""
    message: dict[str, Any] = {"execute": choices.choice(COMMANDS)}
    if choices.random() < 0.7:
        message["arguments"] = {choices.choice(_ARGUMENTS): value(choices) for _ in range(choices.randrange(3))}
    if choices.random() < 0.7:
        message["id"] = value(choices)
    return mutate(choices, json.dumps(message, ensure_ascii=choices.random() < 0.5).encode())


# The share of messages that are not mutated.
_WHOLE = 0.7


def mutate(choices: random.Random, data: bytes) -> bytes:
    """Return the data unchanged, or with bytes changed, removed, repeated or inserted."""
    if choices.random() < _WHOLE:
        return data
    changed = bytearray(data)
    for _ in range(choices.randrange(1, 4)):
        at = choices.randrange(len(changed) + 1)
        match choices.randrange(5):
            case 0:
                changed[at : at + 1] = bytes([choices.randrange(256)])
            case 1:
                del changed[at : at + choices.randrange(1, 9)]
            case 2:
                changed[at:at] = changed[at : at + choices.randrange(1, 40)]
            case 3:
                changed[at:at] = choices.randbytes(choices.randrange(1, 9))
            case _:
                changed[at:at] = choices.choice((b"{", b"}", b"[", b"]", b'"', b"\\", b"\0", b"\xff\xfe", b"{" * 2000))
    return bytes(changed)


MAKERS: dict[str, Callable[[random.Random], bytes]] = {"varlink": call, "qmp": command}
