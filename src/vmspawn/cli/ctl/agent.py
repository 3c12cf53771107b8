# SPDX-License-Identifier: LGPL-2.1-or-later
"""Implements the verb `agent`, which prints or installs the agent, for builders of images."""

from __future__ import annotations

import argparse
import os
import sys

from ...errors import SystemFailure, UsageError
from .replies import say
from .verbs import Verbs

_UNIT_DIRECTORY = "usr/lib/systemd/system"
_WANTS_DIRECTORY = f"{_UNIT_DIRECTORY}/sysinit.target.wants"


def add(verbs: Verbs) -> None:
    """Add the verb."""
    agent = verbs.add("agent", _agent, "print the agent that runs commands in guests, or install it in an image")
    agent.add_argument("--unit", action="store_true", help="print its systemd unit instead")
    agent.add_argument("--root", metavar="DIR", help="install the agent and its unit in this tree instead")
    agent.add_argument(
        "--architecture", choices=("x86_64", "aarch64"), default="x86_64", help="architecture of the guest"
    )


def _agent(options: argparse.Namespace) -> None:
    # No other verb needs these modules.
    from ...agent import build, install

    if options.unit and options.root is not None:
        raise UsageError("--unit prints the unit, and --root= installs it", hint="use only one of the two")
    if options.unit:
        print(install.installed_unit().decode(), end="")
        return
    if options.root is None and sys.stdout.isatty():
        raise UsageError("cannot print the agent, a program, on a terminal", hint="use --root=DIR, or > FILE")
    with open(build.build(options.architecture), "rb") as file:
        agent = file.read()
    if options.root is None:
        sys.stdout.buffer.write(agent)
        return
    try:
        _install(options.root, agent, install.installed_unit())
    except OSError as error:
        raise SystemFailure(f"cannot install the agent in {options.root}", error.errno or 0) from None
    say(options, f"Installed {install.INSTALLED_PATH} and {install.UNIT} in {options.root}.")


def _install(root: str, agent: bytes, unit: bytes) -> None:
    """Install the agent in a tree. Raises UsageError or OSError."""
    from ...agent import install

    if not os.path.isdir(root):
        raise UsageError(f"--root={root} is not a directory")
    _write(os.path.join(root, install.INSTALLED_PATH.lstrip("/")), agent, 0o755)
    _write(os.path.join(root, _UNIT_DIRECTORY, install.UNIT), unit, 0o644)
    link = os.path.join(root, _WANTS_DIRECTORY, install.UNIT)
    os.makedirs(os.path.dirname(link), exist_ok=True)
    if not os.path.islink(link):
        os.symlink(f"../{install.UNIT}", link)


def _write(path: str, content: bytes, mode: int) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(f"{path}.new", "wb") as file:
        file.write(content)
        os.fchmod(file.fileno(), mode)
    os.rename(f"{path}.new", path)
