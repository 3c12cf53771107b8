# SPDX-License-Identifier: LGPL-2.1-or-later
"""Runs QEMU in a scope unit of its own, with a slice and properties that the user chooses.

systemd-run makes the unit, because it knows every property and its type: it asks the service manager for the scope,
moves itself into it, and becomes QEMU. The process keeps its id, its descriptors and its exit status.
"""

from __future__ import annotations

from ..errors import StartError
from ..search_path import find_program
from .machined import Registration, scope_name

_PROGRAM = "systemd-run"
_HINT = "leave out {registration.slice=} and {registration.properties=} on hosts without systemd"


def prefix(registration: Registration, name: str) -> list[str]:
    """Return the words to put in front of QEMU's command line; an empty list if vmspawn makes no scope.

    Raises StartError.
    """
    if not registration.own_scope:
        return []
    manager = "--user" if registration.user else "--system"
    slice_option = [f"--slice={registration.slice}"] if registration.slice else []
    properties = [f"--property={each}" for each in registration.properties]
    return [
        _program(),
        *(manager, "--scope", "--quiet", "--collect", "--no-ask-password"),
        f"--unit={scope_name(name)}",
        f"--description=Virtual Machine {name}",
        *slice_option,
        *properties,
        "--",
    ]


def _program() -> str:
    if path := find_program(_PROGRAM):
        return path
    raise StartError.with_fields(
        "{registration.slice=} and {registration.properties=} need {program}, which is not installed",
        hint=_HINT,
        program=_PROGRAM,
    )
