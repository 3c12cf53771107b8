# SPDX-License-Identifier: LGPL-2.1-or-later
"""Defines the options for the guest's console."""

import argparse
import os
from typing import TypedDict

from ...boot.config import CONSOLE_TRANSPORTS, CONSOLES, ConsoleTerminal
from ...console.terminal import is_foreground, window_size

_STDIN, _STDOUT = 0, 1


class Console(TypedDict):
    """Fields of MachineConfig."""

    console: str
    console_transport: str
    console_log: str | None
    terminal: ConsoleTerminal | None


def add(parser: argparse.ArgumentParser) -> None:
    """Add the options to the command's parser."""
    group = parser.add_argument_group("Console")
    group.add_argument(
        "--console",
        choices=CONSOLES,
        help="show the guest's console: interactive (default on a terminal), read-only (default elsewhere), native "
        "(QEMU's own terminal and monitor), gui (in a window) or headless (not at all)",
    )
    group.add_argument(
        "--console-transport",
        choices=CONSOLE_TRANSPORTS,
        default=CONSOLE_TRANSPORTS[0],
        help="device of the console: serial (default; ttyS0, or ttyAMA0 on virt) or virtio (hvc0)",
    )
    group.add_argument("--log", metavar="FILE", help="append the console's output to a file")


def read(options: argparse.Namespace) -> Console:
    """Read the options."""
    console = options.console or _default_console()
    return {
        "console": console,
        "console_transport": options.console_transport,
        "console_log": os.path.abspath(options.log) if options.log else None,
        "terminal": _own_terminal() if console == "interactive" else None,
    }


def _default_console() -> str:
    """Return interactive on a terminal in the foreground, else read-only."""
    return "interactive" if is_foreground(_STDIN) and os.isatty(_STDOUT) else "read-only"


def _own_terminal() -> ConsoleTerminal | None:
    """Return the terminal's type and size for the guest, or None without a terminal."""
    if not os.isatty(_STDOUT):
        return None
    name = os.environ.get("TERM", "")
    is_plain = name.replace("-", "").replace("+", "").replace(".", "").isalnum() and name.isascii()
    return ConsoleTerminal(name if is_plain else "", *window_size(_STDOUT))
