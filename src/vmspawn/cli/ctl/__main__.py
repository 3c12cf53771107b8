# SPDX-License-Identifier: LGPL-2.1-or-later
"""Runs the command vmctl for `python -m vmspawn.cli.ctl`."""

from .main import main

main()
