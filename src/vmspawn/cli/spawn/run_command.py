# SPDX-License-Identifier: LGPL-2.1-or-later
"""Defines the options for a machine that runs one command in its guest."""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING

from ...boot.config import MachineConfig
from ...errors import UsageError
from ...timeouts import FOREVER

if TYPE_CHECKING:
    from ...manager.job import Job


def add(parser: argparse.ArgumentParser) -> None:
    """Add the options to the command's parser."""
    group = parser.add_argument_group("Command in the guest")
    group.add_argument(
        "--run",
        metavar="COMMAND",
        help="run a command with sh in the guest, on vmspawn's standard streams; then end the machine, and exit with "
        "the command's status",
    )
    group.add_argument("--agent", metavar="BOOL", help="give the guest the agent that runs commands (default: yes)")


def check(options: argparse.Namespace) -> None:
    """Raise UsageError for options that contradict each other."""
    if options.run is not None and options.adopt:
        raise UsageError("--run= starts a machine, and --adopt does not", hint="use: vmctl exec")
    if options.run is not None and options.console not in (None, "headless"):
        raise UsageError(
            "--run= uses the standard streams", hint="leave out --console=; keep the console's output with --log="
        )


def apply(options: argparse.Namespace, config: MachineConfig) -> MachineConfig:
    """Return the configuration. With --run=, no console is shown, because the command uses the standard streams."""
    if options.run is None:
        return config
    if not config.agent:
        raise UsageError("--run= needs the agent", hint="leave out --agent=no")
    return config._replace(console="headless", terminal=None)


def job(options: argparse.Namespace, config: MachineConfig) -> Job | None:
    """Return the job that the options describe."""
    if options.run is None:
        return None
    from ...manager.job import Job

    exec_verb = (sys.executable, "-m", "vmspawn.cli.ctl", "exec", "--program=vmspawn", f"--timeout={FOREVER}")
    return Job([*exec_verb, *_directory(config), config.name or "", "--", "sh", "-c", os.fsdecode(options.run)])


def _directory(config: MachineConfig) -> list[str]:
    """Return the option for the command's directory, if the built-in guest runs commands in a directory of the host.

    The command's directory is the current directory if the guest has it, else /.
    """
    if not config.is_userland:
        return []
    here, root = os.getcwd(), os.path.realpath(config.directory or "/")
    inside = os.path.relpath(here, root)
    return ["-C", "/" if inside == "." or inside.startswith("..") else f"/{inside}"]
