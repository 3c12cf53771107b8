# SPDX-License-Identifier: LGPL-2.1-or-later
"""Implements the verbs that change the medium of an optical drive."""

from __future__ import annotations

import argparse

from ...control.client import Client
from ...timeouts import TRAY_TIMEOUT
from .images import add_format, add_path, call_with_image
from .replies import MACHINE, client_waiting_for_guest, failing_to, say
from .verbs import Verbs, add_disk

_FORCE = "open the tray even if the guest has locked it"


def add(verbs: Verbs) -> None:
    """Add the verbs."""
    insert = verbs.add_for_machine("insert-media", _insert, "insert an image into an optical drive", "DISK PATH")
    add_disk(insert)
    add_path(insert)
    add_format(insert)
    insert.add_argument("--force", action="store_true", help=_FORCE)
    eject = verbs.add_for_machine("eject-media", _eject, "eject the image from an optical drive", "DISK")
    add_disk(eject)
    eject.add_argument("--force", action="store_true", help=_FORCE)


def _timeout(options: argparse.Namespace) -> dict[str, int]:
    return {} if options.timeout is None else {"timeoutUSec": int(options.timeout * 1e6)}


def _insert(options: argparse.Namespace) -> None:
    with client_waiting_for_guest(options, TRAY_TIMEOUT) as client, failing_to("insert", options.path):
        wanted = {
            "name": options.disk,
            "format": options.format,
            "force": options.force,
            **_timeout(options),
        }
        call_with_image(client, "InsertMedia", options.path, wanted, read_only=True)
    say(options, f"Inserted {options.path} into {options.disk}")


def _eject(options: argparse.Namespace) -> None:
    with (
        client_waiting_for_guest(options, TRAY_TIMEOUT) as client,
        failing_to("eject", f"the medium of {options.disk}"),
    ):
        was_empty = _is_empty_drive(client, options.disk)
        client.call(f"{MACHINE}.EjectMedia", {"name": options.disk, "force": options.force, **_timeout(options)})
    say(options, f"{options.disk} had no medium" if was_empty else f"Ejected the medium of {options.disk}")


def _is_empty_drive(client: Client, name: str) -> bool:
    disks = client.call(f"{MACHINE}.ListStorage", {"sizes": False})["storage"]
    return any(each["name"] == name and each["node"] is None for each in disks)
