# SPDX-License-Identifier: LGPL-2.1-or-later
"""Runs the command vmctl, for its script and for `python -m vmspawn.cli.ctl`."""

from .. import set_default_sigint


def main() -> None:
    """Run vmctl and exit."""
    set_default_sigint()
    from .main import main as run

    run()


if __name__ == "__main__":
    main()
