# SPDX-License-Identifier: LGPL-2.1-or-later
"""Defines the options for the machine as a whole, and for vmspawn's own messages."""

import argparse
from typing import TypedDict

from ...errors import UsageError
from ...timeouts import SHUTDOWN_TIMEOUT
from ...version import VERSION
from .. import values


class General(TypedDict):
    """Fields of MachineConfig."""

    name: str | None
    uuid: str | None
    qmp_log: str
    shutdown_timeout: float
    time_limit: float | None
    die_with_parent: bool


def add(parser: argparse.ArgumentParser) -> None:
    """Add the options to the command's parser."""
    group = parser.add_argument_group("General")
    group.add_argument("-h", "--help", action="help", help="show this help")
    group.add_argument("--version", action="version", version=f"vmspawn {VERSION}", help="show the version")
    words = group.add_mutually_exclusive_group()
    words.add_argument("-q", "--quiet", action="store_true", help="print nothing but errors")
    words.add_argument(
        "-v", "--verbose", action="store_true", help="report defaults that were chosen and features that were skipped"
    )
    group.add_argument(
        "-M", "--machine", metavar="NAME", help="name of the machine (default: from the image, kernel or directory)"
    )
    group.add_argument("--uuid", metavar="UUID", help="set the machine's UUID")
    group.add_argument("--qmp-log", metavar="FILE", default="", help="write a transcript of QEMU's monitors")
    group.add_argument(
        "--die-with-parent", action="store_true", help="end the machine when vmspawn or its parent process dies"
    )
    group.add_argument(
        "--shutdown-timeout",
        metavar="SECONDS",
        default=f"{SHUTDOWN_TIMEOUT:g}",
        help="end a guest that does not power off in this time (default: %(default)s)",
    )
    group.add_argument(
        "--time-limit", metavar="SECONDS", help="end the machine at once after this time, with exit status 124"
    )


def read(options: argparse.Namespace) -> General:
    """Read the options. Raises UsageError."""
    return {
        # An empty name means no name, as in systemd-vmspawn.
        "name": options.machine or None,
        "uuid": options.uuid,
        "qmp_log": options.qmp_log,
        "die_with_parent": options.die_with_parent,
        "shutdown_timeout": _seconds("--shutdown-timeout=", options.shutdown_timeout),
        "time_limit": None if options.time_limit is None else _limit(options.time_limit),
    }


def _limit(text: str) -> float:
    if (limit := _seconds("--time-limit=", text)) > 0:
        return limit
    raise UsageError("--time-limit=0 leaves no time to run", hint="write a number of seconds above 0")


def _seconds(option: str, text: str) -> float:
    try:
        return float("inf") if text in ("inf", "infinity") else values.seconds(text)
    except argparse.ArgumentTypeError as error:
        raise UsageError(f"{option}{error}", hint="write a number of seconds, 0 or more") from None
