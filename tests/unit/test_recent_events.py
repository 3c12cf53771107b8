# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests which events are kept for `vmctl status`."""

import pytest

from vmspawn.machine.recent_events import is_of_command
from vmspawn.qmp.events import Event


@pytest.mark.parametrize(
    ("event", "expected"),
    [
        (Event("VSERPORT_CHANGE", {"open": True, "id": "stream12"}), True),
        (Event("DEVICE_DELETED", {"device": "stream0", "path": "/machine/peripheral/stream0"}), True),
        (Event("VSERPORT_CHANGE", {"open": True, "id": "agent"}), False),
        (Event("VSERPORT_CHANGE", {"open": True, "id": "upstream1"}), False),
        (Event("DEVICE_DELETED", {"path": "/machine/peripheral-anon/device[0]"}), False),
        (Event("BLOCK_JOB_READY", {"device": "stream0"}), False),
        (Event("STOP", None), False),
    ],
)
def test_events_of_ports_for_commands_are_left_out(event: Event, expected: bool) -> None:
    assert is_of_command(event) is expected
