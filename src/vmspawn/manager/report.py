# SPDX-License-Identifier: LGPL-2.1-or-later
"""Writes a report of a fault to a file that survives the machine."""

from __future__ import annotations

import os
import sys
import time
import traceback
from typing import TYPE_CHECKING

from ..cache import cache_directory
from ..errors import UsageError
from ..host import runtime
from ..text import printable
from ..version import VERSION

if TYPE_CHECKING:
    from ..machine.running import Running

#: The number of reports that are kept; older ones are removed.
REPORTS_MAX = 20

#: The maximum number of bytes of a file that go into a report. The end of a longer file is used.
_LOG_SIZE = 64 << 10


def write_report(name: str, what: str, machine: Running | None, error: BaseException | None = None) -> str:
    """Write a report and return its path, or an empty string if it cannot be written.

    The report has the machine's state, its last events and QEMU's log. It does not contain data of images, or the
    console's output.
    """
    try:
        folder = os.path.join(cache_directory(), "reports")
        path = os.path.join(folder, f"{name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.txt")
        os.makedirs(folder, mode=0o700, exist_ok=True)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with open(fd, "w", errors="replace") as file:
            file.write("\n".join(_lines(what, machine, error)) + "\n")
        _remove_old(folder)
    except (UsageError, OSError):
        return ""
    return path


def _lines(what: str, machine: Running | None, error: BaseException | None) -> list[str]:
    system = os.uname()
    lines = [what, "", *(_head(machine) if machine is not None else ())]
    lines += [
        f"vmspawn {VERSION}, Python {sys.version.split()[0]}",
        f"{system.sysname} {system.release} {system.machine}",
    ]
    lines += ["", "To report this fault, attach this file"]
    if machine is not None and machine.config.qmp_log:
        lines.append(f"  and {machine.config.qmp_log}, the messages on QEMU's monitors")
    if error is not None:
        lines += ["", "--- traceback", "".join(traceback.format_exception(error)).rstrip()]
    return [*lines, *(_history(machine) if machine is not None else ())]


def _head(machine: Running) -> list[str]:
    return [
        f"machine {machine.name}, {machine.config.machine_type}, process {machine.pid} of QEMU",
        f"QEMU {machine.qemu_version} ({machine.accelerator})",
    ]


def _history(machine: Running) -> list[str]:
    lines = ["", "--- last events"]
    for each in machine.recent_events.events:
        lines.append(f"{time.strftime('%H:%M:%S', time.localtime(each.when))} {printable(each.text)}")
    for name in (runtime.STATE, runtime.LOG):
        lines += ["", f"--- {name}", *map(printable, _end_of(machine, name).splitlines())]
    return lines


def _end_of(machine: Running, name: str) -> str:
    try:
        return machine.directory.read(name)[-_LOG_SIZE:].decode(errors="replace")
    except OSError as error:
        return f"({error})"


def _remove_old(folder: str) -> None:
    reports = [os.path.join(folder, name) for name in os.listdir(folder) if name.endswith(".txt")]
    reports.sort(key=os.path.getmtime)
    for path in reports[:-REPORTS_MAX]:
        os.unlink(path)
