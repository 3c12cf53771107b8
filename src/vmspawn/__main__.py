# SPDX-License-Identifier: LGPL-2.1-or-later
"""Runs the command vmspawn for `python -m vmspawn`."""

from .cli.spawn.__main__ import main

main()
