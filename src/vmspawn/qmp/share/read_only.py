# SPDX-License-Identifier: LGPL-2.1-or-later
"""Allows a read-only session the commands that do not change QEMU, the guest or other clients.

A command with a result may still change something: `ringbuf-read` removes its result, `add-fd` keeps a descriptor,
`human-monitor-command` runs any command. So commands are allowed by name, after an inspection of QEMU's sources.
"""

from __future__ import annotations

#: QEMU's prefixes of commands that only read.
_QUERIES = (b"query-", b"x-query-")

#: Commands with these prefixes that change something.
_NOT_ONLY_QUERIES = frozenset(
    (
        # Enables NIC_RX_FILTER_CHANGED again, for all clients (hw/net/virtio-net.c).
        b"query-rx-filter",
        # Resets the counters that it returns, until QEMU 8.0.
        b"x-query-profile",
    )
)

#: Other commands that only read.
_HARMLESS = frozenset(
    (
        b"qom-get",
        b"qom-list",
        b"qom-list-get",
        # These make an object of a type, and drop it without realizing it.
        b"qom-list-types",
        b"qom-list-properties",
        b"device-list-properties",
        b"trace-event-get-state",
        b"x-accel-stats",
        b"x-debug-query-block-graph",
        b"xen-event-list",
        # Changes only the session itself.
        b"qmp_capabilities",
    )
)


def allows(command: bytes) -> bool:
    """Return whether a read-only session may run the command."""
    return command in _HARMLESS or (command.startswith(_QUERIES) and command not in _NOT_ONLY_QUERIES)


def refusal(command: bytes) -> str:
    """Return the error for a read-only session that runs a command which is not allowed."""
    return (
        f"The command {command.decode()} is refused: this session is read-only and may only run commands that change "
        "nothing, for example query-*, qom-list and qom-get"
    )
