# SPDX-License-Identifier: LGPL-2.1-or-later
"""Implements the verb `console`, which shows a running machine's console on this terminal."""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import sys

from ...control.client import Client, connect
from ...errors import NotConnected, VmspawnError
from ...host import runtime
from ..disconnect import watching
from .replies import client_for, report
from .verbs import Verbs

_STDIN, _STDOUT = 0, 1

#: Seconds for the call that reports the window's size.
_RESIZE_TIMEOUT = 5.0


def add(verbs: Verbs) -> None:
    """Add the verb."""
    attach = verbs.add_for_machine("console", _console, "attach to a machine's console")
    attach.add_argument("--read-only", action="store_true", help="show the console without input")


def _console(options: argparse.Namespace) -> None:
    """Show the console until the user detaches or the machine ends. A signal ends vmctl.

    Raises NotConnected if the connection is closed while the machine runs.
    """
    # No other verb needs these modules.
    from ...console.attach import ConsoleAttachment
    from ...console.terminal import window_size

    with client_for(options) as client:
        client.call("io.vmspawn.Machine.Describe")
    console = _connect(options.machine)

    def resized() -> None:
        rows, columns = window_size(_STDOUT)
        if rows and columns and not options.read_only:
            with contextlib.suppress(VmspawnError), Client(options.machine, timeout=_RESIZE_TIMEOUT) as client:
                client.call("io.vmspawn.Machine.ResizeConsole", {"rows": rows, "columns": columns})

    keys = "; ^]^]^] detaches" if os.isatty(_STDIN) else ""
    report(options, f"attached to machine {options.machine}{keys}")
    with console, watching(options.machine, console) as disconnect:
        attachment = ConsoleAttachment(console, _STDIN, _STDOUT, read_only=options.read_only, on_resize=resized)
        number = attachment.run()
        if number:
            # The exit status of a shell for a program that a signal ended.
            sys.exit(128 + number)
        if attachment.has_hung_up:
            disconnect.check()
    how = "has ended" if attachment.has_hung_up else "continues"
    report(options, f"machine {options.machine} {how}")


def _connect(machine: str) -> socket.socket:
    try:
        return connect(machine, runtime.CONSOLE)
    except NotConnected:
        raise NotConnected(
            f"cannot attach to {machine}: it shares no console", hint="it was started with --console=native"
        ) from None
