# SPDX-License-Identifier: LGPL-2.1-or-later
"""Refuses commands that make QEMU start a program, if QEMU's sandbox forbids that.

Under `-sandbox spawn=deny` the kernel ends QEMU with SIGSYS for it (QEMU 7.2), or refuses (11.1). Which commands start
programs was looked up in QEMU's sources: migration over `exec:` (migration/exec.c), helpers and scripts of TAP devices
and bridges (net/tap.c), and programs that user networking connects the guest with (net/slirp.c).
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

#: Values of `script` and `downscript` for which QEMU runs nothing; a script that is not named is run as well.
_NO_SCRIPT = ("", "no")

_HUMAN_MIGRATE = re.compile(r"""\s*migrate(?:_incoming|_recover)?(?:\s+-\w+)*\s+["']?exec:""")
_HUMAN_NETDEV = re.compile(r"\s*netdev_add\s+(\S+)")


def refusal(command: Command) -> str | None:
    """Return why QEMU's sandbox would not let it run a command of STARTERS, or None."""
    try:
        arguments = msgspec.json.decode(command.arguments or b"{}", type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None  # QEMU will say what is wrong
    found = _human_program(arguments) if command.name == b"human-monitor-command" else _program(command, arguments)
    if found is None:
        return None
    program, hint = found
    return (
        f"The command {command.name.decode()} is refused: it makes QEMU start {program}, which QEMU's sandbox forbids "
        f"(-sandbox spawn=deny); {hint}, or start the machine with another -sandbox"
    )


def _program(command: Command, arguments: dict[str, Any]) -> tuple[str, str] | None:
    """Return which program a command starts, and what to do instead."""
    if command.name == b"netdev_add":
        return _network_program(arguments)
    channels = arguments.get("channels")
    addresses = [each.get("addr") for each in channels if isinstance(each, dict)] if isinstance(channels, list) else []
    by_channel = any(isinstance(each, dict) and each.get("transport") == "exec" for each in addresses)
    if by_channel or str(arguments.get("uri", "")).startswith("exec:"):
        return "the program of exec:", _MIGRATE_HINT
    return None


def _network_program(options: dict[str, Any]) -> tuple[str, str] | None:
    """Return which program a network back end starts: at once, at its end, or when the guest connects."""
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
    """Return which program a command of QEMU's monitor for people starts."""
    line = str(arguments.get("command-line", ""))
    if _HUMAN_MIGRATE.match(line):
        return "the program of exec:", _MIGRATE_HINT
    if found := _HUMAN_NETDEV.match(line):
        kind, *settings = found[1].strip("\"'").split(",")
        options: dict[str, Any] = dict(setting.partition("=")[::2] for setting in settings)
        return _network_program({"type": kind.removeprefix("type="), **options})
    return None
