# SPDX-License-Identifier: LGPL-2.1-or-later
"""Implements the verbs `bind-volume` and `unbind-volume`, with machinectl's syntax.

They call systemd's methods, so they also work on machines of systemd-vmspawn.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

from ...control.client import Client, VarlinkError
from ...errors import BadConfig, ConfigNotSupported, NoSuchStorage, StorageExists, StorageImmutable, VmspawnError
from ...host import storageprovider
from .. import volumes
from .replies import INSTANCE, client_for, failing_to, say
from .verbs import Verbs, disk_name

#: The classes, reasons and hints for errors of systemd's interface, which have no message.
_EXPLAINED: dict[str, tuple[type[VmspawnError], str, str]] = {
    "NoSuchStorage": (NoSuchStorage, "there is no disk of that name", "see: vmctl list-disks {machine}"),
    "StorageExists": (StorageExists, "a disk of that name, or with the same file, is attached", ""),
    "StorageImmutable": (StorageImmutable, "it is a boot disk, which cannot be detached while the machine runs", ""),
    "BadConfig": (BadConfig, "this volume, name and bus make no valid disk", "try another bus"),
    "ConfigNotSupported": (ConfigNotSupported, "the machine does not support this disk", "try another bus"),
}


def add(verbs: Verbs) -> None:
    """Add the verbs."""
    bind = verbs.add_for_machine("bind-volume", _bind, "attach a volume of a storage provider", "VOLUME")
    bind.description = f"{bind.description}\nVOLUME is {volumes.SYNTAX}."
    bind.add_argument("volume", metavar="VOLUME", help="volume, bus, and how to create the volume")
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
            _call(client, "AddStorage", wanted, fds=(fd,))
        finally:
            os.close(fd)
    say(options, f"Bound {name}")


def _unbind(options: argparse.Namespace) -> None:
    with client_for(options) as client, failing_to("unbind", options.volume):
        _call(client, "RemoveStorage", {"name": options.volume})
    say(options, f"Unbound {options.volume}")


def _call(client: Client, method: str, parameters: dict[str, Any], *, fds: tuple[int, ...] = ()) -> None:
    try:
        client.call(f"{INSTANCE}.{method}", parameters, fds=fds)
    except VarlinkError as error:
        if error.name != f"{INSTANCE}.{error.leaf}" or error.leaf not in _EXPLAINED:
            raise
        kind, reason, hint = _EXPLAINED[error.leaf]
        raise kind(reason, hint=hint.format(machine=client.machine)) from None
