# SPDX-License-Identifier: LGPL-2.1-or-later
"""Allows a read-only session the commands that do not change QEMU, the guest and the other clients.

A command that returns something may still change something: `ringbuf-read` removes what it returns, `add-fd` keeps a
descriptor, `human-monitor-command` runs any command. So commands are allowed by name, after a look at QEMU's sources.
"""

from __future__ import annotations

#: QEMU's convention for commands that only read.
_QUERIES = (b"query-", b"x-query-")

#: The exceptions.
_NOT_ONLY_QUERIES = frozenset(
    (
        # Arms NIC_RX_FILTER_CHANGED anew, for everybody (hw/net/virtio-net.c).
        b"query-rx-filter",
        # Restarts the counters that it shows; until QEMU 8.0.
        b"x-query-profile",
    )
)

#: Other commands that only read.
_HARMLESS = frozenset(
    (
        b"qom-get",
        b"qom-list",
        b"qom-list-get",
        # These go through what is known of types, for which they make an object and drop it, unrealized.
        b"qom-list-types",
        b"qom-list-properties",
        b"device-list-properties",
        b"trace-event-get-state",
        b"x-accel-stats",
        b"x-debug-query-block-graph",
        b"xen-event-list",
        # The session's own; later ones are refused by QEMU.
        b"qmp_capabilities",
    )
)


def allows(command: bytes) -> bool:
    """Whether a read-only session may run the command."""
    return command in _HARMLESS or (command.startswith(_QUERIES) and command not in _NOT_ONLY_QUERIES)


def refusal(command: bytes) -> str:
    """Return the error for a read-only session that runs another command."""
    return (
        f"The command {command.decode()} is refused: this session is read-only and may only run commands that change "
        "nothing, such as query-*, qom-list and qom-get"
    )
