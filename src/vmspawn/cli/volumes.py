# SPDX-License-Identifier: LGPL-2.1-or-later
"""vmctl's bind-volume and unbind-volume, with the syntax of machinectl's."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import Any

from ..boot.config import parse_size
from ..errors import UsageError
from ..host import storageprovider
from ..host.storageprovider import Volume
from ..storage.disk import BUSES
from .ctl.calling import INSTANCE, client_for, context
from .parser import boolean


def parse(option: str, text: str) -> Volume:
    """Parse a volume, whose CONFIG must be a bus. Raises UsageError."""
    volume = storageprovider.parse(option, text, parse_size, boolean)
    if volume.config and volume.config not in BUSES:
        raise UsageError(f"{option}{text}: unknown bus {volume.config}", hint=f"there are: {', '.join(BUSES)}")
    return volume


def add_verbs(verbs: Any, add_verb: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the verbs; `add_verb` makes one that takes a machine."""
    bind = add_verb(verbs, "bind-volume", _bind, "plug in a volume of a storage provider")
    bind.usage = f"vmctl bind-volume MACHINE {storageprovider.SYNTAX} [OPTION…]"
    bind.add_argument("volume", metavar=storageprovider.SYNTAX, help="the volume, its bus, and how it is created")
    bind.add_argument("--user", action="store_true", default=os.geteuid() != 0, help="ask the user's providers")
    bind.add_argument("--system", dest="user", action="store_false", help="ask the system's providers")
    unbind = add_verb(verbs, "unbind-volume", _unbind, "unplug a volume")
    unbind.usage = "vmctl unbind-volume MACHINE PROVIDER:VOLUME [OPTION…]"
    unbind.add_argument("volume", metavar="PROVIDER:VOLUME", help="the volume")


# As machinectl, by systemd's own methods: so they work on the machines of systemd-vmspawn as well.


def _bind(options: argparse.Namespace) -> None:
    volume = parse("", options.volume)
    with client_for(options) as client, context(f"cannot bind {volume.disk_name}"):
        fd = storageprovider.acquire(volume, user=options.user, read_only=volume.config == "scsi-cd")
        try:
            wanted = {"fileDescriptorIndex": 0, "name": volume.disk_name, "config": volume.config or None}
            client.call(f"{INSTANCE}.AddStorage", wanted, fds=(fd,))
        finally:
            os.close(fd)
    if not options.quiet and options.json == "off":
        print(f"Bound {volume.disk_name}")


def _unbind(options: argparse.Namespace) -> None:
    with client_for(options) as client, context(f"cannot unbind {options.volume}"):
        client.call(f"{INSTANCE}.RemoveStorage", {"name": options.volume})
    if not options.quiet and options.json == "off":
        print(f"Unbound {options.volume}")
