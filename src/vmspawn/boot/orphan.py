# SPDX-License-Identifier: LGPL-2.1-or-later
"""Ends a QEMU that has no manager."""

from __future__ import annotations

import contextlib
import os
import signal

from ..aio.sockets import is_readable
from ..errors import StartError
from ..host import runtime
from ..host.runtime import MachineDirectory

#: Seconds within which QEMU must end after a signal.
_END_TIMEOUT = 5.0


def end_orphan(name: str) -> None:
    """End a QEMU that has no manager, and remove its files.

    SIGTERM lets QEMU close its images. A QEMU that is stopped, or does not end in time, is killed.
    Raises NotConnected if the machine does not exist, StartError if it has a manager or cannot be killed.
    """
    directory = MachineDirectory.take_over(name)
    try:
        if pid := runtime.running_qemu(directory.path):
            _end_process(name, pid)
        elif directory.has_monitor():
            raise StartError(
                f"machine {name} runs, but its QEMU is unknown: its manager died while it started QEMU",
                hint=f"adopt it first: vmctl adopt {name}",
            )
        directory.remove()
    finally:
        directory.close()


def _end_process(name: str, pid: int) -> None:
    process = os.pidfd_open(pid)
    try:
        if not runtime.process_trouble(pid) and _ends_after(process, signal.SIGTERM):
            return
        if _ends_after(process, signal.SIGKILL):
            return
    finally:
        os.close(process)
    trouble = runtime.process_trouble(pid) or "does not end"
    raise StartError(f"cannot end the QEMU of machine {name}: process {pid} {trouble}")


def _ends_after(process: int, number: signal.Signals) -> bool:
    """Send a signal, and return whether the process ends soon."""
    # The process may have ended by itself.
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(process, number)
    return is_readable(process, within=_END_TIMEOUT)
