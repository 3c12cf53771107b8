# SPDX-License-Identifier: LGPL-2.1-or-later
"""Implements the verbs that reach the guest's SSH server with OpenSSH."""

from __future__ import annotations

import argparse
import os
import signal
import sys

from ...control.client import Client
from ...errors import NotConnected, NotInstalled, NotSupported, UsageError, VmspawnError
from ...host.runtime import check_name, machine_names
from ...network.forward import Forward
from ...network.openssh import Access, access_of, key_of
from ...search_path import find_program
from ..entrypoint import EXIT_OWN_FAILURE, complain
from ..tables import print_json
from .replies import MACHINE, reply_timeout
from .verbs import PROGRAM, Verbs


def add(verbs: Verbs) -> None:
    """Add the verbs."""
    ssh = verbs.add("ssh", _ssh, "log into the guest, or run a command there, by SSH",
                    "[USER@]MACHINE [OPTION…] [COMMAND…]")  # fmt: skip
    ssh.exit_usage = EXIT_OWN_FAILURE
    ssh.add_argument(
        "machine", metavar="[USER@]MACHINE", help="user (default: root) and name of the machine; see: vmctl list"
    )
    ssh.add_argument("command", metavar="COMMAND", nargs="*", help="command that the user's shell runs in the guest")
    ssh.end_options_here()
    ssh.add_argument("-t", "--tty", action="store_true", help="run the command on a terminal")
    config = verbs.add("ssh-config", _config, "print a configuration for ssh, scp, rsync and others", "[MACHINE…]")
    config.add_argument(
        "machines", metavar="MACHINE", nargs="*", help="name of a machine (default: all machines with an SSH key)"
    )


def _ssh(options: argparse.Namespace) -> None:
    """Execute ssh in place of vmctl, so that signals, the terminal and the exit status are those of ssh."""
    user, at, name = options.machine.rpartition("@")
    try:
        if at and not user:
            raise UsageError("the name of the user is empty", hint="write MACHINE to log in as root")
        access = _access(name, reply_timeout(options))
        program = find_program("ssh")
        if program is None:
            raise NotInstalled(
                "ssh is not installed", hint="install it (Debian: openssh-client; Fedora: openssh-clients)"
            )
        arguments = ["ssh", *(["-t"] if options.tty else []), *access.options(user if at else "root")]
        # ssh parses options after the host's name too.
        arguments += ["--", *options.command] if options.command else []
        # Python ignores these signals, which ssh would inherit.
        for number in (signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(number, signal.SIG_DFL)
        os.execv(program, arguments)
    except VmspawnError as error:
        complain(PROGRAM, error)
    except OSError as error:
        complain(PROGRAM, NotInstalled(f"cannot run ssh: {error.strerror}"))
    sys.exit(EXIT_OWN_FAILURE)


def _config(options: argparse.Namespace) -> None:
    found = [_access(name, reply_timeout(options)) for name in options.machines] or _all(reply_timeout(options))
    if options.json != "off":
        print_json([each._asdict() for each in found], options.json)
    else:
        print("\n".join(each.configuration() for each in found), end="")


def _all(timeout: float) -> list[Access]:
    """Return the SSH access to each machine that has a key and a forward."""
    found = []
    for name in machine_names():
        if key_of(name):
            try:
                found.append(_access(name, timeout))
            except (NotConnected, NotSupported):
                continue  # the machine has ended, or its forward was removed
    return found


def _access(machine: str, timeout: float) -> Access:
    """Return the SSH access to a machine. Raises NotSupported without a key or a forward, NotConnected, UsageError."""
    with Client(check_name(machine), timeout=timeout) as client:
        listed = client.call(f"{MACHINE}.ListForwards")["forwards"]
    key = key_of(machine)
    if not key:
        raise NotSupported(f"machine {machine} has no SSH key", hint="start it with --pass-ssh-key=yes")
    forwards = [Forward(each["guestPort"], each["port"], each["address"], each["protocol"]) for each in listed]
    access = access_of(machine, forwards, key)
    if access is None:
        raise NotSupported(
            f"no port of this host is forwarded to the SSH server of machine {machine}",
            hint=f"forward one: vmctl forward {machine} 0:22",
        )
    return access
