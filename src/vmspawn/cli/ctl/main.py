# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command `vmctl`: talk to running machines.

It is a few blocking calls on a machine's control socket and imports no asyncio: a verb must feel instant.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import Any, NoReturn

from ...control.client import Client, VarlinkError
from ...errors import NotConnected, Timeout, UsageError
from ...host import machined
from ...host.runtime import check_name, machine_names, running_qemu, runtime_root
from ...text import printable
from ...version import VERSION
from .. import adopt, volumes
from ..disconnect import watching
from ..entrypoint import run
from ..parser import Formatter, Parser, number
from ..tables import JSON_MODES, format_duration, print_fields, print_json
from . import console, disks, qmp, wait
from .calling import INSTANCE, MACHINE, client_for, context, show

_PROGRAM = "vmctl"

#: How many of the last events `status` shows.
_EVENTS_SHOWN = 5

#: Seconds that `list` waits for each machine, so that one that is stuck does not hide the others.
_LIST_TIMEOUT = 2.0


def build_parser() -> Parser:
    """The command's verbs and options."""
    parser = Parser(
        prog=_PROGRAM,
        usage="vmctl [OPTION…] VERB [MACHINE] …",
        description="Control virtual machines that vmspawn runs.",
        formatter_class=Formatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"vmctl {VERSION}", help="show the version")
    _add_common(parser, top=True)
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", dest="verb", required=True)
    _add_machine_verbs(verbs)
    disks.add_verbs(verbs, _add_machine_verb)
    volumes.add_verbs(verbs, _add_machine_verb)
    _add_event_verbs(verbs)
    _add_console_verb(verbs)
    _add_qmp_verbs(verbs)
    return parser


def _add_common(parser: argparse.ArgumentParser, *, top: bool) -> None:
    """The global options, which may stand before the verb and after it."""
    default: dict[str, Any] = {} if top else {"default": argparse.SUPPRESS}
    json_default: dict[str, Any] = {"default": "off"} if top else {"default": argparse.SUPPRESS}
    parser.add_argument(
        "-j", dest="json", action="store_const", const="pretty", help="the same as --json=pretty", **json_default
    )
    parser.add_argument("--json", choices=JSON_MODES, help="print JSON for programs", **json_default)
    parser.add_argument("-q", "--quiet", action="store_true", help="say nothing but errors", **default)
    timeout_default: dict[str, Any] = {"default": None} if top else {"default": argparse.SUPPRESS}
    parser.add_argument(
        "--timeout", metavar="SECONDS", type=_seconds, help="how long to wait for an answer", **timeout_default
    )


def _seconds(text: str) -> float:
    return number(text, 0, 1e6, "a number of seconds")


def _add_verb(
    verbs: Any, name: str, action: Callable[[argparse.Namespace], None], text: str
) -> argparse.ArgumentParser:
    parser: Parser = verbs.add_parser(name, help=text, description=text, allow_abbrev=False, formatter_class=Formatter)
    parser.prog, parser.verb = _PROGRAM, name
    parser.usage = f"{_PROGRAM} {name} [OPTION…]"
    _add_common(parser, top=False)
    parser.set_defaults(action=action)
    return parser


def _add_machine_verb(verbs: Any, name: str, action: Callable[[argparse.Namespace], None], text: str) -> Any:
    parser = _add_verb(verbs, name, action, text)
    parser.add_argument("machine", metavar="MACHINE", help="its name; see: vmctl list")
    parser.usage = f"{_PROGRAM} {name} MACHINE [OPTION…]"
    return parser


def _add_machine_verbs(verbs: Any) -> None:
    _add_verb(verbs, "list", _list, "list the running machines")
    _add_machine_verb(verbs, "status", _status, "show a machine")
    _add_machine_verb(verbs, "adopt", adopt.run, "start a manager for a machine whose own has died")
    for name, method, text in (
        ("poweroff", "PowerOff", "press a machine's power button"),
        ("reboot", "Reboot", "reset a machine"),
        ("pause", "Pause", "stop a machine's processors"),
        ("resume", "Resume", "let a machine's processors run on"),
        ("terminate", "Terminate", "end a machine at once, without asking the guest"),
    ):
        verb = _add_machine_verb(verbs, name, _simple, text)
        verb.set_defaults(method=method, wait=False)
        if name in ("poweroff", "reboot", "terminate"):
            wait.add_options(verb)


def _add_event_verbs(verbs: Any) -> None:
    events = _add_machine_verb(verbs, "events", _events, "show a machine's events as they come")
    events.add_argument("--filter", metavar="EVENT[,EVENT…]", default="", help="only these events")


def _add_console_verb(verbs: Any) -> None:
    attach = _add_machine_verb(verbs, "console", console.run, "attach to a machine's console")
    console.add_options(attach)


def _add_qmp_verbs(verbs: Any) -> None:
    session = _add_machine_verb(verbs, "qmp", qmp.run, "talk QMP to a machine: one command, a pipe, or a shell")
    session.usage = f"{_PROGRAM} qmp MACHINE [COMMAND [ARGUMENT…]] [OPTION…]"
    qmp.add_options(session)
    _add_machine_verb(verbs, "list-sessions", _list_sessions, "list the QMP clients of a machine")
    share = _add_verb(verbs, "qmp-share", qmp.share, "share the QMP socket of any QEMU among many clients")
    share.usage = f"{_PROGRAM} qmp-share SOCKET LISTEN [OPTION…]"
    share.add_argument("socket", metavar="SOCKET", help="QEMU's QMP socket, which nobody else may hold")
    share.add_argument("listen", metavar="LISTEN", help="the socket to make, for any number of clients")


# The verbs. Each raises VmspawnError if it did not happen.


def _list(options: argparse.Namespace) -> None:
    names = sorted({*machine_names(), *machined.machines()})
    machines = [found for name in names if (found := _look_at(name)) is not None]
    columns = ("MACHINE", "STATE", "QEMU", "ACCEL", "PID")
    show(options, machines, "machines", columns, _machine_row, right=("PID",))


def _machine_row(machine: dict[str, Any]) -> tuple[str, ...]:
    words = (machine[key] for key in ("name", "status", "qemuVersion", "accelerator"))
    return (*words, str(machine["processId"] or "-"))


def _look_at(name: str) -> dict[str, Any] | None:
    """A machine's description, or None if nothing runs under the name. One that does not answer is listed as such."""
    try:
        folder = os.path.join(runtime_root(), check_name(name))
        with Client(name, timeout=_LIST_TIMEOUT) as client:
            return _describe(client, name)
    except UsageError:
        return None
    except NotConnected:
        if pid := running_qemu(folder):
            return {"name": name, "status": "no manager", "qemuVersion": "-", "accelerator": "-", "processId": pid}
        return None
    except Timeout:
        return {"name": name, "status": "unresponsive", "qemuVersion": "-", "accelerator": "-", "processId": 0}


def _describe(client: Client, name: str) -> dict[str, Any]:
    """What a machine says of itself. One of systemd-vmspawn's knows but its status."""
    try:
        return client.call(f"{MACHINE}.Describe")
    except VarlinkError as error:
        if error.leaf not in ("InterfaceNotFound", "MethodNotFound"):
            raise
        status = client.call(f"{INSTANCE}.Describe")["status"]
        return {"name": name, "status": status, "qemuVersion": "-", "accelerator": "-", "processId": 0}


def _status(options: argparse.Namespace) -> None:
    with client_for(options) as client:
        found = _describe(client, options.machine)
        disks = client.call(f"{MACHINE}.ListStorage")["storage"] if "ports" in found else []
    if options.json != "off":
        print_json({**found, "storage": disks}, options.json)
        return
    print_fields([("Machine", found["name"]), ("State", found["status"]), *_details(found, disks)])


def _details(found: dict[str, Any], disks: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """What only a machine of our own says of itself."""
    if "ports" not in found:
        return []
    qemu = f"{found['qemuVersion']}, {found['accelerator']}, {found['machineType']}, pid {found['processId']}"
    return [
        ("Up", format_duration(found["uptimeUSec"] / 1e6)),
        ("QEMU", qemu),
        ("Ports", f"{found['portsFree']} of {found['ports']} free"),
        ("Disks", ", ".join(map(_disk_text, disks)) or "none"),
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


def _simple(options: argparse.Namespace) -> None:
    with context(f"cannot {options.verb} {options.machine}"):
        if options.wait:
            wait.run(options)
            return
        with client_for(options) as client:
            client.call(f"{INSTANCE}.{options.method}")


def _list_sessions(options: argparse.Namespace) -> None:
    with client_for(options) as client:
        sessions = client.call(f"{MACHINE}.ListSessions")["sessions"]
    columns = ("PID", "UID", "COMMAND", "MODE", "COMMANDS", "EVENTS", "IN", "OUT", "QUEUED")
    numbers = ("PID", "UID", "COMMANDS", "EVENTS", "IN", "OUT", "QUEUED")
    show(options, sessions, "QMP sessions", columns, _session_row, right=numbers)


def _session_row(session: dict[str, Any]) -> tuple[str, ...]:
    who = [str(session[key]) if session[key] is not None else "-" for key in ("processId", "userId", "command")]
    counts = [str(session[key]) for key in ("commands", "events", "bytesIn", "bytesOut", "queued")]
    return (*who, "ro" if session["readOnly"] else "rw", *counts)


def _events(options: argparse.Namespace) -> None:
    wanted = [name for name in options.filter.split(",") if name]
    with client_for(options) as client, watching(options.machine, client.connection) as parting:
        try:
            for event in client.stream(f"{INSTANCE}.SubscribeEvents", {"filter": wanted}):
                _print_event(event, options.json)
        except VarlinkError as error:
            # The machine ended, and its events with it.
            if error.leaf != "NotConnected":
                raise
        except NotConnected:
            parting.check()


def _print_event(event: dict[str, Any], mode: str) -> None:
    if mode != "off":
        print_json(event, mode)
        return
    import time

    data = event.get("data") or {}
    words = " ".join(f"{key}={value}" for key, value in data.items())
    print(printable(f"{time.strftime('%H:%M:%S')} {event['event']} {words}".rstrip()), flush=True)


def _main() -> int:
    options = build_parser().parse_args()
    options.action(options)
    return 0


def main() -> NoReturn:
    """The entry point."""
    run(_PROGRAM, _main)


if __name__ == "__main__":
    main()
