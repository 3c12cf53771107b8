# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who has an image open, for the message that says why it cannot be had."""

from __future__ import annotations

import os

from ..errors import VmspawnError
from ..host import runtime


def holder_of(identity: tuple[int, ...]) -> str:
    """Who else has the file: `machine NAME`, or `COMM (process PID)`, or nothing if that cannot be seen.

    `identity` is a Backing's: st_dev and st_ino of a file, st_rdev of a block device.
    """
    return _machine_with(identity) or _process_with(identity)


def _machine_with(identity: tuple[int, ...]) -> str:
    for name in _machines():
        folder = os.path.join(runtime.runtime_root(), name)
        try:
            state = runtime.read_state(folder)
            pid = int(state["qemu"]["pid"])
            if pid != 0 and runtime.running_qemu(folder) == pid and list(identity) in _identities(state):
                return f"machine {name}"
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return ""


def _machines() -> list[str]:
    try:
        return runtime.machine_names()
    except VmspawnError:
        return []  # the message that this is for goes without


def _identities(state: dict[str, dict[str, list[dict[str, list[dict[str, dict[str, list[int]]]]]]]]) -> list[list[int]]:
    attachments = state["storage"]["attachments"]
    return [image["backing"]["identity"] for each in attachments for image in each["images"] if image["backing"]]


def _process_with(identity: tuple[int, ...]) -> str:
    for pid in filter(str.isdigit, os.listdir("/proc")):
        if int(pid) == os.getpid():
            continue
        try:
            for fd in os.listdir(f"/proc/{pid}/fd"):
                found = os.stat(f"/proc/{pid}/fd/{fd}")
                if (found.st_dev, found.st_ino) == identity or (found.st_rdev and (found.st_rdev,) == identity):
                    with open(f"/proc/{pid}/comm", encoding="utf-8", errors="backslashreplace") as file:
                        return f"{file.read().strip()} (process {pid})"
        except OSError:
            continue
    return ""
