# SPDX-License-Identifier: LGPL-2.1-or-later
"""The verb `vmctl install-extras`."""

from __future__ import annotations

import argparse
import os
import sys

from ...errors import ExtrasError
from ...text import printable
from .. import extras
from ..tables import print_json
from .verbs import Verbs


def add(verbs: Verbs) -> None:
    """Add the verb."""
    parser = verbs.add("install-extras", _run, "install man pages, shell completion and the systemd unit")
    parser.add_argument("--user", action="store_true", help="below ~/.local/share, for this user alone")
    parser.add_argument("--remove", action="store_true", help="remove what was installed")


def _run(options: argparse.Namespace) -> None:
    destination = extras.user_destination() if options.user else extras.system_destination()
    if options.remove:
        _remove(options, destination)
        return
    files = extras.wanted_files(extras.SOURCES, destination, _command())
    extras.install(files, destination.record)
    if options.json != "off":
        print_json({"installed": [file.path for file in files]}, options.json)
    elif not options.quiet:
        print(*(f"installed {printable(file.path)}" for file in files), *_advice(destination), sep="\n")


def _remove(options: argparse.Namespace, destination: extras.Destination) -> None:
    removed, kept = extras.remove(destination.record)
    if options.json != "off":
        print_json({"removed": removed, "kept": kept}, options.json)
        return
    if not options.quiet:
        print(*(f"removed {printable(path)}" for path in removed) if removed else ("Nothing is installed.",), sep="\n")
    for path in kept:
        print(f"vmctl: {printable(path)} has changed since it was installed, and stays", file=sys.stderr)


def _command() -> str:
    """The path of the command vmspawn: beside this vmctl, or where this Python's commands are. Raises ExtrasError."""
    import sysconfig

    for folder in (os.path.dirname(os.path.abspath(sys.argv[0])), sysconfig.get_path("scripts")):
        if os.access(path := os.path.join(folder, "vmspawn"), os.X_OK):
            return path
    raise ExtrasError(f"there is no command vmspawn in {sysconfig.get_path('scripts')}", hint="install vmspawn again")


def _advice(destination: extras.Destination) -> list[str]:
    """What is left to do where a program does not look into the folders by itself."""
    manager = "systemctl --user" if destination.is_user else "systemctl"
    lines = [f"If the unit was there before: {manager} daemon-reload"]
    if destination.is_user:
        lines.append(f"For zsh, before compinit in ~/.zshrc: fpath=({destination.folder('zsh')} $fpath)")
        if not _man_finds(destination.share):
            lines.append(f"For man, in ~/.profile: export MANPATH={destination.share}/man:")
    return [printable(line) for line in lines]


def _man_finds(share: str) -> bool:
    """Whether man searches a folder's manual: it does beside each folder of PATH that is called bin."""
    beside = os.path.join(os.path.dirname(share), "bin")
    return os.path.basename(share) == "share" and beside in os.environ.get("PATH", "").split(":")
