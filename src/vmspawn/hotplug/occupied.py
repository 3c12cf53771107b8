# SPDX-License-Identifier: LGPL-2.1-or-later
"""Finds the ports and slots that have a device, because QMP clients can plug in devices too."""

from __future__ import annotations

from typing import Any

from ..qmp.monitor import Command, Monitor
from .places import Layout, PciPlace


async def occupied_places(monitor: Monitor, layout: Layout, *, timeout: float) -> frozenset[PciPlace]:
    """Return the ports and slots that have a device. Raises what `Monitor.execute` raises."""
    if layout.ports:
        return await _ports(monitor, layout, timeout)
    buses: list[dict[str, Any]] = await monitor.execute("query-pci", timeout=timeout)
    return frozenset(PciPlace(layout.bus, hex(device["slot"])) for bus in buses for device in bus["devices"])


async def _ports(monitor: Monitor, layout: Layout, timeout: float) -> frozenset[PciPlace]:
    """Return the ports that have a device.

    query-pci does not list the device in a port until the firmware has given the port a bus number.
    """
    ports = [place for place in layout.pci.places if isinstance(place, PciPlace)]
    commands = [Command("qom-list", {"path": f"/machine/peripheral/{port.bus}/{port.bus}"}) for port in ports]
    found = await monitor.execute_all(commands, timeout=timeout)
    return frozenset(port for port, listed in zip(ports, found, strict=True) if _has_device(listed))


def _has_device(listed: Any) -> bool:
    return isinstance(listed, list) and any(str(each["name"]).startswith("child[") for each in listed)
