# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests the options of the pytest plugin's machines."""

from vmspawn.network.forward import Forward
from vmspawn.testing.lab import RecordedMachine


def test_a_copy_takes_the_options_of_copies() -> None:
    machine = RecordedMachine.of({"name": "copy", "snapshot": "source@s", "forwards": [22], "console": "headless"})
    assert machine.config.forwards == (Forward(22),)
