# SPDX-License-Identifier: LGPL-2.1-or-later
"""Implements the verbs `bind-volume` and `unbind-volume`, with machinectl's syntax.

They call systemd's methods, so they also work on machines of systemd-vmspawn.
"""

from __future__ import annotations

import argparse
import os

from ...host import storageprovider
from .. import volumes
from .replies import INSTANCE, client_for, failing_to, say
from .verbs import Verbs, disk_name


def add(verbs: Verbs) -> None:
    """Add the verbs."""
    bind = verbs.add_for_machine("bind-volume", _bind, "attach a volume of a storage provider", volumes.SYNTAX)
    bind.add_argument("volume", metavar=volumes.SYNTAX, help="volume, bus, and how to create the volume")
    bind.add_argument("--user", action="store_true", default=os.geteuid() != 0, help="use the user's providers")
    bind.add_argument("--system", dest="user", action="store_false", help="use the system's providers")
    unbind = verbs.add_for_machine("unbind-volume", _unbind, "detach a volume", "PROVIDER:VOLUME")
    unbind.add_argument("volume", metavar="PROVIDER:VOLUME", type=disk_name, help="name of the volume")


def _bind(options: argparse.Namespace) -> None:
    volume = volumes.parse("", options.volume)
    name = disk_name(volume.disk_name)
    with client_for(options) as client, failing_to("bind", name):
        fd = storageprovider.acquire(volume, user=options.user, read_only=volume.config == "scsi-cd")
        try:
            wanted = {"fileDescriptorIndex": 0, "name": name, "config": volume.config or None}
            client.call(f"{INSTANCE}.AddStorage", wanted, fds=(fd,))
        finally:
            os.close(fd)
    say(options, f"Bound {name}")


def _unbind(options: argparse.Namespace) -> None:
    with client_for(options) as client, failing_to("unbind", options.volume):
        client.call(f"{INSTANCE}.RemoveStorage", {"name": options.volume})
    say(options, f"Unbound {options.volume}")
