# SPDX-License-Identifier: LGPL-2.1-or-later
"""Finds the machine or process that has an image open, for error messages."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from ..errors import VmspawnError
from ..host import runtime


def holder_of(identity: tuple[int, ...], *, ours: str = "") -> str:
    """Return the user of a file: `machine NAME`, or `COMMAND (process PID)`, or an empty string if it is not visible.

    `identity` is that of a Backing: st_dev and st_ino of a file, st_rdev of a block device. `ours` is the machine that
    the image is for; it is returned only if its QEMU has the file open and no other process is found.
    """
    own_pid = runtime.running_qemu(os.path.join(runtime.runtime_root(), ours)) if ours else 0
    others = _machine_with(identity, ours) or _process_with(identity, {os.getpid(), own_pid})
    if not others and own_pid and any(_open_files(own_pid, identity)):
        return f"machine {ours} itself"
    return others


def _machine_with(identity: tuple[int, ...], ours: str) -> str:
    for name in _machines():
        directory = os.path.join(runtime.runtime_root(), name)
        try:
            state = runtime.read_state(directory)
            pid = int(state["qemu"]["pid"])
            is_running = pid != 0 and runtime.running_qemu(directory) == pid
            if name != ours and is_running and list(identity) in _identities(state):
                return f"machine {name}"
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return ""


def _machines() -> list[str]:
    try:
        return runtime.machine_names()
    except VmspawnError:
        return []  # the message then names no machine


def _identities(state: dict[str, dict[str, list[dict[str, list[dict[str, dict[str, list[int]]]]]]]]) -> list[list[int]]:
    attachments = state["storage"]["attachments"]
    return [image["backing"]["identity"] for each in attachments for image in each["images"] if image["backing"]]


def _process_with(identity: tuple[int, ...], excluded: set[int]) -> str:
    """Return the process that holds a lock on the file, or else a process that has the file open."""
    found = ""
    for pid in (int(name) for name in os.listdir("/proc") if name.isdigit()):
        if pid in excluded:
            continue
        with contextlib.suppress(OSError):
            for fd in _open_files(pid, identity):
                with open(f"/proc/{pid}/comm", encoding="utf-8", errors="backslashreplace") as file:
                    found = f"{file.read().strip()} (process {pid})"
                if _is_locked(pid, fd):
                    return found
    return found


def _open_files(pid: int, identity: tuple[int, ...]) -> Iterator[str]:
    """Yield a process's descriptors of the file. Stops at a descriptor that the caller may not inspect."""
    with contextlib.suppress(OSError):
        for fd in os.listdir(f"/proc/{pid}/fd"):
            found = os.stat(f"/proc/{pid}/fd/{fd}")
            if (found.st_dev, found.st_ino) == identity or (found.st_rdev and (found.st_rdev,) == identity):
                yield fd


def _is_locked(pid: int, fd: str) -> bool:
    """Return whether a process holds locks by a descriptor (proc_pid_fdinfo(5))."""
    with open(f"/proc/{pid}/fdinfo/{fd}", encoding="utf-8") as file:
        return any(line.startswith("lock:") for line in file)
