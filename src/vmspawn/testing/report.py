# SPDX-License-Identifier: LGPL-2.1-or-later
"""Describes a machine in the report of a failed test."""

from __future__ import annotations

from .. import sync
from ..api.events import describe
from ..errors import VmspawnError
from ..machine.ending import MACHINE_ENDED
from ..text import printable

#: The maximum number of console lines, of log lines and of events.
_LINES = 100
_EVENTS = 20

Sections = list[tuple[str, str]]


def sections(label: str, machine: sync.Machine) -> Sections:
    """Return sections about a machine, each a title and a text. Sections without content are left out."""
    found = [("", _summary(machine)), ("console", _console(machine)), ("events", _events(machine))]
    found += [("disks", _disks(machine)), ("QEMU's standard error", _log(machine))]
    title = f"vm {label}"
    return [(f"{title}: {name}" if name else title, text) for name, text in found if text]


def _summary(machine: sync.Machine) -> str:
    running = machine._inner._running
    config = running.config
    last = machine.events.recent[-1:]
    state = str((last[0].data or {})["message"]) if last and last[0].name == MACHINE_ENDED else running.status
    what = config.image or config.linux or config.directory or f"the {config.guest} guest"
    lines = [
        f"name      {machine.name}: {state}",
        f"boots     {what}",
        f"hardware  {config.machine_type}, {config.cpus} CPU, {config.ram_bytes >> 20} MiB",
        f"QEMU      {running.qemu_version} ({running.accelerator}), process {running.pid}",
        f"QMP log   {config.qmp_log}",
    ]
    return "\n".join(lines)


def _console(machine: sync.Machine) -> str:
    try:
        lines = machine.console._inner.last_lines(_LINES)
    except VmspawnError:
        return ""
    return "\n".join(lines) or "(nothing)"


def _events(machine: sync.Machine) -> str:
    return "\n".join(printable(describe(event)) for event in machine.events.recent[-_EVENTS:])


def _disks(machine: sync.Machine) -> str:
    try:
        disks = machine.disks()
    except VmspawnError:
        return ""
    rows = [("NAME", "BUS", "FORMAT", "SIZE", "STATE", "PATH")]
    for each in disks:
        size = f"{each.size >> 20} MiB" if each.size >= 1 << 20 else f"{each.size} bytes"
        rows.append((each.disk.name, each.disk.bus, each.disk.format, size, each.state, each.path or "-"))
        if each.last_failure:
            rows.append(("", "", "", "", "failed:", each.last_failure))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines) if disks else ""


def _log(machine: sync.Machine) -> str:
    log = machine._inner._running.directory.read_log()
    return "\n".join(printable(line) for line in log.splitlines()[-_LINES:])
