# SPDX-License-Identifier: LGPL-2.1-or-later
"""Run the command for `python -m vmspawn.cli.spawn`."""

from .main import main

main()
