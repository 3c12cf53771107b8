# SPDX-License-Identifier: LGPL-2.1-or-later
"""Implements the verbs that list machines, show one, and change its state."""

from __future__ import annotations

import argparse
import os
from typing import Any

from ...control.client import Client, VarlinkError
from ...errors import NotConnected, SystemFailure, Timeout, UsageError
from ...host import machined
from ...host.runtime import (
    check_name,
    is_starting,
    lock_holder,
    machine_names,
    process_trouble,
    running_qemu,
    runtime_root,
)
from ...timeouts import LIST_TIMEOUT
from ..tables import format_duration, print_fields, print_json
from . import wait
from .forwards import forward_text
from .replies import INSTANCE, MACHINE, client_for, failing_to, show
from .state_change import change
from .verbs import Verbs

#: The number of recent events that `status` shows.
_EVENTS_SHOWN = 5


def add(verbs: Verbs) -> None:
    """Add the verbs."""
    verbs.add("list", _list, "list running machines")
    status = verbs.add("status", _status, "show a machine", "[MACHINE]")
    status.add_argument("machine", metavar="MACHINE", nargs="?", help="name of the machine (default: the only machine)")
    for name, method, text in (
        ("poweroff", "PowerOff", "press a machine's power button"),
        ("reboot", "Reboot", "reset a machine"),
        ("pause", "Pause", "pause a machine's processors"),
        ("resume", "Resume", "resume a paused machine"),
        ("terminate", "Terminate", "end a machine at once, without asking the guest"),
    ):
        verb = verbs.add_for_machine(name, _change_state, text)
        verb.set_defaults(method=method, wait=False)
        if name in ("poweroff", "reboot", "terminate"):
            wait.add_option(verb)


def _list(options: argparse.Namespace) -> None:
    machines = [found for name in _names() if (found := _look_at(name)) is not None]
    columns = ("MACHINE", "STATE", "QEMU", "ACCEL", "PID")
    show(options, machines, "machines", columns, _machine_row, right=("PID",))


def _names() -> list[str]:
    return sorted({*machine_names(), *machined.machines()})


def _machine_row(machine: dict[str, Any]) -> tuple[str, ...]:
    words = (machine[key] for key in ("name", "status", "qemuVersion", "accelerator"))
    return (*words, str(machine["processId"] or "-"))


def _look_at(name: str) -> dict[str, Any] | None:
    """Return a machine's description, or None if no machine has the name.

    A machine that hangs or refuses the connection gets a description with that status.
    """
    try:
        folder = os.path.join(runtime_root(), check_name(name))
        with Client(name, timeout=LIST_TIMEOUT) as client:
            found = _describe(client, name)
        return found if found.get("responding", True) else {**found, "status": "unresponsive"}
    except UsageError:
        return None
    except NotConnected:
        if pid := running_qemu(folder):
            return _unknown(name, "not served" if lock_holder(folder) else "no manager", pid)
        return None
    except Timeout:
        return _unknown(name, "starting" if is_starting(folder) else "unresponsive")
    except SystemFailure:
        return _unknown(name, "unreachable")


def _unknown(name: str, status: str, pid: int = 0) -> dict[str, Any]:
    return {"name": name, "status": status, "qemuVersion": "-", "accelerator": "-", "processId": pid}


def _describe(client: Client, name: str) -> dict[str, Any]:
    """Return a machine's description. A machine of systemd-vmspawn reports only its status."""
    try:
        return client.call(f"{MACHINE}.Describe")
    except VarlinkError as error:
        if error.leaf not in ("InterfaceNotFound", "MethodNotFound"):
            raise
        status = client.call(f"{INSTANCE}.Describe")["status"]
        return {"name": name, "status": status, "qemuVersion": "-", "accelerator": "-", "processId": 0}


def _only_machine() -> str:
    """Return the name of the only running machine. Raises UsageError if no machine or several machines run."""
    names = [name for name in _names() if _look_at(name) is not None]
    if len(names) == 1:
        return names[0]
    if not names:
        raise UsageError("no machine is running", hint="start one, for example: vmspawn --guest=builtin")
    raise UsageError(f"{len(names)} machines are running", hint=f"name one of them: {', '.join(names)}")


def _status(options: argparse.Namespace) -> None:
    if options.machine is None:
        options.machine = _only_machine()
    with client_for(options) as client:
        found = _describe(client, options.machine)
        disks = _disks(client, found)
        forwards = _forwards(client, found)
    if options.json != "off":
        print_json({**found, "storage": disks, "forwards": forwards}, options.json)
        return
    print_fields([("Machine", found["name"]), ("State", _state(found)), *_details(found, disks, forwards)])


def _disks(client: Client, found: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a machine's disks, without their sizes if QEMU does not answer."""
    if "ports" not in found:
        return []
    parameters = {} if found.get("responding", True) else {"sizes": False}
    disks: list[dict[str, Any]] = client.call(f"{MACHINE}.ListStorage", parameters)["storage"]
    return disks


def _forwards(client: Client, found: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a machine's forwards, or nothing if QEMU does not answer or the manager is too old."""
    if "ports" not in found or not found.get("responding", True):
        return []
    try:
        forwards: list[dict[str, Any]] = client.call(f"{MACHINE}.ListForwards")["forwards"]
    except VarlinkError as error:
        if error.leaf != "MethodNotFound":
            raise
        return []
    return forwards


def _state(found: dict[str, Any]) -> str:
    if found.get("responding", True):
        return str(found["status"])
    trouble = process_trouble(found["processId"])
    return f"{found['status']} (last known state): QEMU does not answer" + (f" and {trouble}" if trouble else "")


def _details(
    found: dict[str, Any], disks: list[dict[str, Any]], forwards: list[dict[str, Any]]
) -> list[tuple[str, str]]:
    """Return the fields that only a machine of vmspawn reports."""
    if "ports" not in found:
        return []
    qemu = f"{found['qemuVersion']}, {found['accelerator']}, {found['machineType']}, pid {found['processId']}"
    return [
        ("Up", format_duration(found["uptimeUSec"] / 1e6)),
        ("QEMU", qemu),
        ("Ports", f"{found['portsFree']} of {found['ports']} free"),
        ("Disks", ", ".join(map(_disk_text, disks)) or "none"),
        *([("Forwards", "\n".join(map(forward_text, forwards)))] if forwards else ()),
        ("Sessions", str(found["sessions"])),
        ("Last error", _happening(found["lastError"]) if found["lastError"] else "none"),
        ("Events", "\n".join(map(_happening, found["recentEvents"][-_EVENTS_SHOWN:])) or "none"),
    ]


def _disk_text(disk: dict[str, Any]) -> str:
    remark = disk["lastFailure"] or ("" if disk["state"] == "attached" else disk["state"])
    return f"{disk['name']} ({remark})" if remark else str(disk["name"])


def _happening(found: dict[str, Any]) -> str:
    import time

    return f"{time.strftime('%H:%M:%S', time.localtime(found['realTimeUSec'] / 1e6))} {found['text']}"


def _end_if_orphan(name: str) -> bool:
    """End a machine that has no manager. Returns False if it has one.

    Raises NotConnected if the machine does not run, or its manager accepts no connection.
    """
    try:
        Client(name).close()
    except NotConnected:
        folder = os.path.join(runtime_root(), name)
        if not running_qemu(folder) or lock_holder(folder):
            raise
        from ...boot.orphan import end_orphan

        end_orphan(name)
        return True
    return False


def _change_state(options: argparse.Namespace) -> None:
    with failing_to(options.verb, options.machine):
        if options.verb == "terminate" and _end_if_orphan(options.machine):
            return
        if options.wait:
            wait.run(options)
            return
        with client_for(options) as client:
            change(options, client)
