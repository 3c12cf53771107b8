# SPDX-License-Identifier: LGPL-2.1-or-later
"""Runs the command vmspawn for `python -m vmspawn.cli.spawn`."""

from .main import main

main()
