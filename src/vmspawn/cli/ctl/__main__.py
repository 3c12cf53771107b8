# SPDX-License-Identifier: LGPL-2.1-or-later
"""Run the command for `python -m vmspawn.cli.ctl`."""

from .main import main

main()
