# SPDX-License-Identifier: LGPL-2.1-or-later
"""Implements the verb `install-extras`."""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING

from ...errors import ExtrasError
from ...text import printable
from ..tables import print_json
from .verbs import Verbs

if TYPE_CHECKING:
    from ..extras import Destination


def add(verbs: Verbs) -> None:
    """Add the verb."""
    parser = verbs.add("install-extras", _run, "install man pages, shell completion and the systemd unit")
    parser.add_argument("--user", action="store_true", help="install for this user only, below ~/.local/share")
    parser.add_argument("--remove", action="store_true", help="remove the installed files")


def _run(options: argparse.Namespace) -> None:
    from .. import extras

    destination = extras.user_destination() if options.user else extras.system_destination()
    if options.remove:
        _remove(options, destination)
        return
    command = _command()
    extras.check_command(command, destination)
    files = extras.wanted_files(extras.SOURCES, destination, command)
    extras.install(files, destination.record)
    if options.json != "off":
        print_json({"installed": [file.path for file in files]}, options.json)
    elif not options.quiet:
        print(*(f"installed {printable(file.path)}" for file in files), *_advice(destination), sep="\n")


def _remove(options: argparse.Namespace, destination: Destination) -> None:
    from .. import extras

    removed, kept = extras.remove(destination.record)
    if options.json != "off":
        print_json({"removed": removed, "kept": kept}, options.json)
        return
    if not options.quiet:
        print(*(f"removed {printable(path)}" for path in removed) if removed else ("Nothing is installed.",), sep="\n")
    for path in kept:
        print(f"vmctl: not removed, because it was modified after installation: {printable(path)}", file=sys.stderr)


def _command() -> str:
    """Return the path of vmspawn, beside vmctl or in this Python's scripts directory. Raises ExtrasError."""
    import sysconfig

    scripts = sysconfig.get_path("scripts")
    for folder in (os.path.dirname(os.path.abspath(sys.argv[0])), scripts):
        if os.access(path := os.path.join(folder, "vmspawn"), os.X_OK):
            return path
    raise ExtrasError(f"cannot find the command vmspawn in {scripts}", hint="install vmspawn again")


def _advice(destination: Destination) -> list[str]:
    """Return instructions for programs that do not search the directories by default."""
    manager = "systemctl --user" if destination.is_user else "systemctl"
    lines = [f"To load a changed unit: {manager} daemon-reload"]
    if destination.is_user:
        lines.append(f"For zsh, add to ~/.zshrc before compinit: fpath=({destination.folder('zsh')} $fpath)")
        if not _man_finds(destination.share):
            lines.append(f"For man, add to ~/.profile: export MANPATH={destination.share}/man:")
    return [printable(line) for line in lines]


def _man_finds(share: str) -> bool:
    """Return whether man searches share/man, which it does beside each `bin` directory in PATH."""
    beside = os.path.join(os.path.dirname(share), "bin")
    return os.path.basename(share) == "share" and beside in os.environ.get("PATH", "").split(":")
