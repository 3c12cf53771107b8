# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a read-only session may run."""

from __future__ import annotations

import re

#: Commands that only look. By name: everything that queries, and what QEMU's schema (query-qmp-schema) has besides that
#: returns something and changes nothing. `qmp_capabilities` is the session's own.
_HARMLESS = re.compile(
    rb"(?:x-)?query-.*"
    rb"|qom-(?:get|list|list-get|list-types|list-properties)"
    rb"|device-list-properties"
    rb"|trace-event-get-state"
    rb"|qmp_capabilities",
    re.DOTALL,
)


def allows(command: bytes) -> bool:
    """Whether a read-only session may run the command."""
    return _HARMLESS.fullmatch(command) is not None


def refusal(command: bytes) -> str:
    """What a read-only session is told that may not run the command."""
    name = command.decode()
    return f"The command {name} is refused: this session is read-only and may run query-*, qom-list and qom-get only"
