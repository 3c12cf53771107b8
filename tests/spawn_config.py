# SPDX-License-Identifier: LGPL-2.1-or-later
"""Reads vmspawn's command line as the program does."""

from vmspawn.boot.config import MachineConfig
from vmspawn.cli.spawn.main import build_parser, configure


def parse_config(arguments: list[str]) -> MachineConfig:
    """Return the configuration that the arguments describe. Raises UsageError, or exits as argparse does."""
    return configure(build_parser().parse_args(arguments))
