# SPDX-License-Identifier: LGPL-2.1-or-later
"""Describes a machine in the report of a failed test."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from .. import sync
from ..api.events import describe
from ..boot.console import AGENT_PORT_ID, SIZE_PORT_ID
from ..errors import VmspawnError
from ..machine.ending import MACHINE_ENDED
from ..machine.recent_events import device_of, is_of_command
from ..qmp.events import Event
from ..text import printable

#: The maximum number of console lines, of log lines and of events.
_LINES = 100
_EVENTS = 20

#: The maximum number of commands, of characters of a command, and of lines of its standard error.
COMMANDS_MAX = 20
_COMMAND_WIDTH = 100
_ERROR_LINES = 5

#: Ports that every machine has.
_OWN_PORTS = (AGENT_PORT_ID, SIZE_PORT_ID)

Sections = list[tuple[str, str]]


class Command(NamedTuple):
    """A command that a test ran in the guest. `status` is "-" for a command that did not end."""

    command: str | Sequence[str | bytes]
    status: str
    stderr: str | bytes


def sections(label: str, machine: sync.Machine, commands: Iterable[Command]) -> Sections:
    """Return sections about a machine, each a title and a text. Sections without content are left out."""
    found = [("", _summary(machine)), ("commands", _commands(commands)), ("console", _console(machine))]
    found += [("events", _events(machine)), ("disks", _disks(machine)), ("QEMU's standard error", _log(machine))]
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
    return "\n".join(lines).lstrip("\n") or "(nothing)"


def _commands(commands: Iterable[Command]) -> str:
    lines = []
    for each in commands:
        words = each.command if isinstance(each.command, str) else shlex.join(map(_text, each.command))
        shown = words if len(words) <= _COMMAND_WIDTH else f"{words[:_COMMAND_WIDTH]}…"
        lines.append(f"{each.status:>3}  {printable(shown)}")
        if each.status != "0":
            lines += [f"     {printable(line)}" for line in _text(each.stderr).splitlines()[-_ERROR_LINES:]]
    return "\n".join(lines)


def _text(data: str | bytes) -> str:
    return data if isinstance(data, str) else data.decode(errors="replace")


def _events(machine: sync.Machine) -> str:
    shown = [event for event in machine.events.recent if not _is_own(event)]
    return "\n".join(f"{_time(event)}  {printable(describe(event))}" for event in shown[-_EVENTS:])


def _is_own(event: Event) -> bool:
    return is_of_command(event) or device_of(event) in _OWN_PORTS


def _time(event: Event) -> str:
    """Return the time of day of an event. Events that vmspawn makes have none."""
    if event.timestamp is None:
        return " " * len("00:00:00.000")
    seconds, microseconds = event.timestamp["seconds"], event.timestamp["microseconds"]
    return f"{time.strftime('%H:%M:%S', time.localtime(seconds))}.{microseconds // 1000:03}"


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
    shown = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in shown]
    return "\n".join(lines) if disks else ""


def _log(machine: sync.Machine) -> str:
    log = machine._inner._running.directory.read_log()
    return "\n".join(printable(line) for line in log.splitlines()[-_LINES:])
