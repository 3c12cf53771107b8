# SPDX-License-Identifier: LGPL-2.1-or-later
"""Refuses commands that make QEMU start a program, if QEMU's sandbox forbids that.

With `-sandbox spawn=deny`, the kernel kills QEMU 7.2 with SIGSYS when it starts a program; for QEMU 11.1, the kernel
refuses the start. QEMU's sources show the commands that start programs: migration over `exec:` (migration/exec.c),
helpers and scripts of TAP devices and bridges (net/tap.c), and programs that user networking connects to the guest
(net/slirp.c).
"""

from __future__ import annotations

import re
from typing import Any

import msgspec

from ..syntax.envelope import Command

#: Commands that can start a program.
STARTERS = frozenset((b"migrate", b"migrate-incoming", b"migrate-recover", b"netdev_add", b"human-monitor-command"))

_TAP_HINT = "open the device outside of QEMU, pass it with getfd, and name it with fd="
_MIGRATE_HINT = "use a socket, or pass a descriptor with getfd and name it with fd:"
_USER_HINT = "let QEMU connect to a socket instead"

#: Values of `script` and `downscript` with which QEMU runs no script. Without a value, QEMU runs its default script.
_NO_SCRIPT = ("", "no")

_HUMAN_MIGRATE = re.compile(r"""\s*migrate(?:_incoming|_recover)?(?:\s+-\w+)*\s+["']?exec:""")
_HUMAN_NETDEV = re.compile(r"\s*netdev_add\s+(\S+)")


def refusal(command: Command) -> str | None:
    """Return the error for a command of STARTERS that would start a program, or None for other commands."""
    try:
        arguments = msgspec.json.decode(command.arguments or b"{}", type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None  # QEMU will report the error
    found = _human_program(arguments) if command.name == b"human-monitor-command" else _program(command, arguments)
    if found is None:
        return None
    program, hint = found
    return (
        f"The command {command.name.decode()} is refused: it makes QEMU start {program}, which QEMU's sandbox forbids "
        f"(-sandbox spawn=deny); {hint}, or start the machine with another -sandbox"
    )


def _program(command: Command, arguments: dict[str, Any]) -> tuple[str, str] | None:
    """Return the program that a command starts, and a hint; None if it starts none."""
    if command.name == b"netdev_add":
        return _network_program(arguments)
    channels = arguments.get("channels")
    addresses = [each.get("addr") for each in channels if isinstance(each, dict)] if isinstance(channels, list) else []
    by_channel = any(isinstance(each, dict) and each.get("transport") == "exec" for each in addresses)
    if by_channel or str(arguments.get("uri", "")).startswith("exec:"):
        return "the program of exec:", _MIGRATE_HINT
    return None


def _network_program(options: dict[str, Any]) -> tuple[str, str] | None:
    """Return the program that a network back end starts, at once or later, and a hint; None if it starts none."""
    match options.get("type"):
        case "bridge":
            return "a bridge helper", _TAP_HINT
        case "tap" if options.get("helper") is not None:
            return "the program of helper=", _TAP_HINT
        case "tap" if options.get("fd") is None and options.get("fds") is None:
            for name in ("script", "downscript"):
                if options.get(name) not in _NO_SCRIPT:
                    return f"the program of {name}=", f"add {name}=no"
        case "user" if options.get("smb") is not None:
            return "a file server for smb=", _USER_HINT
        case "user" if "-cmd:" in str(options.get("guestfwd", "")):
            return "the program of guestfwd=", _USER_HINT
    return None


def _human_program(arguments: dict[str, Any]) -> tuple[str, str] | None:
    """Return the program that a command of QEMU's human monitor starts, and a hint; None if it starts none."""
    line = str(arguments.get("command-line", ""))
    if _HUMAN_MIGRATE.match(line):
        return "the program of exec:", _MIGRATE_HINT
    if found := _HUMAN_NETDEV.match(line):
        kind, *settings = found[1].strip("\"'").split(",")
        options: dict[str, Any] = dict(setting.partition("=")[::2] for setting in settings)
        return _network_program({"type": kind.removeprefix("type="), **options})
    return None
