# SPDX-License-Identifier: LGPL-2.1-or-later
"""Delivers the agent to an image as credentials for its systemd. The built-in guest contains the agent.

This module is on the start path. Modules that find and compress the agent are imported only for an image that gets the
agent.
"""

from __future__ import annotations

from collections.abc import Callable

from ..errors import StartError
from .config import MachineConfig


def credentials(
    config: MachineConfig, architecture: str, detail: Callable[[str], None], *, smbios: bool
) -> list[tuple[str, bytes]]:
    """Return the credentials by name. A guest without `smbios` gets none, because they could not reach it."""
    if not config.agent or config.guest:
        return []
    if not smbios:
        detail("the guest does not get the agent, because it has no SMBIOS without UEFI")
        return []
    from ..agent import build, install

    try:
        path = build.build(architecture)
    except StartError as error:
        detail(f"the guest does not get the agent: {error}. {error.hint}")
        return []
    with open(path, "rb") as file:
        agent = file.read()
    given = {each.name for each in config.credentials}
    return [(name, value) for name, value in install.delivery(agent).items() if name not in given]
