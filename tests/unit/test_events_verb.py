# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests that `vmctl events` knows vmspawn's own events."""

from vmspawn.cli.ctl.events import OWN_EVENTS
from vmspawn.machine.ending import MACHINE_ENDED
from vmspawn.storage.attached_disk import ATTACHED_EVENT, DETACHED_EVENT, DETACHING_EVENT
from vmspawn.storage.changes import CHANGED_EVENT
from vmspawn.storage.failures import FAILED_EVENT


def test_the_list_is_complete() -> None:
    of_disks = {ATTACHED_EVENT, DETACHING_EVENT, DETACHED_EVENT, CHANGED_EVENT, FAILED_EVENT}
    assert {*of_disks, MACHINE_ENDED} == set(OWN_EVENTS)
