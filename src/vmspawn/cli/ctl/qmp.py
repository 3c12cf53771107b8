# SPDX-License-Identifier: LGPL-2.1-or-later
"""Implements the verbs for QMP: commands, the shell, raw streams, sessions and shared sockets."""

from __future__ import annotations

import argparse
import os
import socket
import sys
from typing import Any

from ...control.client import Client
from ...errors import NotConnected, NotInstalled, NotSupported, QmpError, UsageError
from ...host import runtime
from ...qmp.share.read_only import allows
from ..disconnect import watching
from ..tables import print_json
from .qmp_session import Session, parse_arguments, relay
from .replies import MACHINE, client_for, reply_timeout, show
from .verbs import Verbs


def add(verbs: Verbs) -> None:
    """Add the verbs."""
    session = verbs.add_for_machine("qmp", _qmp, "run a QMP command, or a QMP shell", "[OPTION…] [COMMAND [ARGUMENT…]]")
    session.add_argument("command", metavar="COMMAND", nargs="?", help="QMP command; without one, start a shell")
    # Options end at the command's first argument.
    session.add_argument("arguments", metavar="ARGUMENT", nargs="*", help="KEY=VALUE, or one JSON object")
    session.end_options_here()
    session.add_argument("--stdio", action="store_true", help="connect standard input and output to the QMP stream")
    session.add_argument("--read-only", action="store_true", help="allow only commands that change nothing")
    verbs.add_for_machine("list-sessions", _list_sessions, "list a machine's QMP clients")
    server = verbs.add_for_machine("qmp-socket", _serve, "serve QMP sessions of a machine on a socket", "SOCKET")
    server.add_argument("listen", metavar="SOCKET", help="socket to create for the clients")
    server.add_argument("--read-only", action="store_true", help="allow only commands that change nothing")
    share = verbs.add("qmp-share", _share, "share any QEMU's QMP socket among many clients", "SOCKET LISTEN")
    share.add_argument("socket", metavar="SOCKET", help="QEMU's QMP socket; no other client may be connected to it")
    share.add_argument("listen", metavar="LISTEN", help="socket to create for the clients")


def _qmp(options: argparse.Namespace) -> None:
    """Run a command, a raw stream or a shell. Raises VmspawnError if the command fails."""
    if options.stdio and options.command:
        raise UsageError("--stdio takes no command", hint="use only one of the two")
    arguments = parse_arguments(options.arguments)
    if not (options.stdio or options.command) and not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise UsageError("the QMP shell needs a terminal", hint="add a command, or use --stdio for a raw stream")
    timeout = reply_timeout(options)
    with Client(options.machine, timeout=timeout) as client:
        connected, received = client.upgrade("io.vmspawn.Machine.AcquireQMP", {"readOnly": options.read_only})
        with watching(options.machine, connected) as disconnect:
            try:
                hung_up = _talk(options, connected, received, arguments, timeout)
            except NotConnected:
                disconnect.check()
                raise
            if hung_up:
                disconnect.check()
                if not options.stdio:
                    print("The machine ended.")


def _talk(
    options: argparse.Namespace, connected: socket.socket, received: bytes, arguments: dict[str, Any], timeout: float
) -> bool:
    """Run the command, the raw stream or the shell. Returns whether the machine closed the connection."""
    if options.stdio:
        return relay(connected, received)
    if not options.command:
        return _shell(connected, received, options.machine)
    mode = options.json if options.json != "off" else "pretty" if sys.stdout.isatty() else "short"
    try:
        print_json(Session(connected, received, timeout).execute(options.command, arguments), mode)
    except QmpError:
        if options.read_only and not allows(os.fsencode(options.command)):
            # The manager refused the command, not QEMU.
            raise NotSupported(
                f"vmspawn refused {options.command}: this session is read-only",
                hint="it allows commands that change nothing, such as query-*, qom-list and qom-get; "
                "for others, leave out --read-only",
            ) from None
        raise
    return False


def _shell(connected: socket.socket, received: bytes, machine: str) -> bool:
    try:
        from .qmp_shell import run_shell
    except ModuleNotFoundError as error:
        if error.name != "prompt_toolkit":
            raise
        raise NotInstalled(
            "the QMP shell needs prompt_toolkit, which is not installed",
            hint="install it with: pipx inject vmspawn prompt_toolkit; or add a command, or use --stdio",
        ) from None
    return run_shell(connected, received, machine)


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


def _serve(options: argparse.Namespace) -> None:
    """Serve sessions until the machine ends. Raises VmspawnError if they cannot be served."""
    import asyncio

    from ...control.qmp_socket import serve_sessions

    def on_ready() -> None:
        if not options.quiet:
            what = "read-only sessions" if options.read_only else "sessions"
            print(
                f"serving QMP {what} of {options.machine} on {options.listen}; Ctrl-C ends it",
                file=sys.stderr,
                flush=True,
            )

    asyncio.run(serve_sessions(options.machine, options.listen, read_only=options.read_only, on_ready=on_ready))


def _refuse_managed_socket(path: str) -> None:
    """Raise UsageError for a socket of a vmspawn machine, because its manager shares that socket already."""
    folder, name = os.path.split(os.path.realpath(path))
    root, machine = os.path.split(folder)
    if name in runtime.MONITORS and root == os.path.realpath(runtime.runtime_root()):
        raise UsageError(
            f"{path} belongs to the manager of machine {machine}, which shares it already",
            hint=f"to serve sessions on another socket: vmctl qmp-socket {machine} SOCKET",
        )


def _share(options: argparse.Namespace) -> None:
    """Share a socket until QEMU ends. Raises VmspawnError if it cannot be shared, or when QEMU ends."""
    import asyncio

    from ...control.share import share_socket
    from ...qmp.limits import GREETING_TIMEOUT

    def on_ready() -> None:
        if not options.quiet:
            print(f"sharing {options.socket} on {options.listen}; Ctrl-C ends it", file=sys.stderr, flush=True)

    _refuse_managed_socket(options.socket)
    timeout = reply_timeout(options, GREETING_TIMEOUT)
    asyncio.run(share_socket(options.socket, options.listen, on_ready=on_ready, timeout=timeout))
