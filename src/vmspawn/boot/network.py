# SPDX-License-Identifier: LGPL-2.1-or-later
"""Adds network cards to a machine that starts."""

from __future__ import annotations

import json

from ..hotplug.places import Place
from ..network.forward import NETDEV
from .extras import Extras


def user_card(place: Place) -> Extras:
    """Add a network card behind QEMU's own NAT, which needs no privileges on the host."""
    # Without the ROM the firmware does not try to boot over this network.
    device = {
        "driver": "virtio-net-pci",
        "id": "network0",
        "netdev": NETDEV,
        **place.properties(),
        "romfile": "",
    }
    return Extras(arguments=("-netdev", f"user,id={NETDEV}", "-device", json.dumps(device)))
