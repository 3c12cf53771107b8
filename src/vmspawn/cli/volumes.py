# SPDX-License-Identifier: LGPL-2.1-or-later
"""Parses volumes of systemd's storage providers: vmspawn's --bind-volume= and vmctl's bind-volume have one syntax."""

from __future__ import annotations

from ..errors import UsageError
from ..host import storageprovider
from ..host.storageprovider import Volume
from ..storage.disk import BUSES
from .values import boolean, parse_size


def parse(option: str, text: str) -> Volume:
    """Parse a volume, whose CONFIG must be a bus. Raises UsageError."""
    volume = storageprovider.parse(option, text, parse_size, boolean)
    if volume.config and volume.config not in BUSES:
        raise UsageError(f"{option}{text}: unknown bus {volume.config}", hint=f"there are: {', '.join(BUSES)}")
    return volume
