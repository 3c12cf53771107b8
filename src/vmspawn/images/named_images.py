# SPDX-License-Identifier: LGPL-2.1-or-later
"""Finds a machine's image by name, in the directories that machinectl and importctl use."""

from __future__ import annotations

import os
from typing import Any

from ..errors import UsageError
from ..user_directories import user_directory

_SYSTEM = ("/etc/machines", "/run/machines", "/var/lib/machines", "/usr/local/lib/machines", "/usr/lib/machines")

#: The directory that the hint suggests for an image.
_DEFAULT = "/var/lib/machines"


def places() -> list[str]:
    """Return the directories to search, in order: the user's directory comes before the system's."""
    if os.geteuid() == 0:
        return list(_SYSTEM)
    state = user_directory("XDG_STATE_HOME", ".local/state")
    return [*([os.path.join(state, "machines")] if state else []), *_SYSTEM]


def find(name: str) -> dict[str, Any]:
    """Return the fields of MachineConfig that boot the image of that name: the file NAME.raw or the directory NAME.

    Raises UsageError if no directory has an image of that name.
    """
    for place in places():
        raw, directory = os.path.join(place, f"{name}.raw"), os.path.join(place, name)
        if os.path.exists(raw):
            return {"image": raw}
        if os.path.isdir(directory):
            return {"directory": directory}
    raise UsageError.with_fields(
        "nothing to boot: no image is named {machine}",
        hint="name one with {image=} or {directory=}, try {guest=builtin}, or put {machine}.raw into {folder}",
        machine=name,
        folder=_DEFAULT,
    )
