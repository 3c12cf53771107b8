# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests QEMU's arguments for the console and the ports of commands."""

import json

import pytest

from vmspawn import MachineConfig
from vmspawn.boot import console


@pytest.mark.parametrize("accelerator", ["kvm", "tcg"])
def test_only_kvm_has_event_descriptors_for_the_queues_of_ports(accelerator: str) -> None:
    arguments = console.devices(MachineConfig(agent=True), accelerator, -1, 3, -1)
    devices = [json.loads(each) for each in arguments if each.startswith("{")]
    (controller,) = (each for each in devices if each["driver"] == "virtio-serial-pci")
    assert controller.get("ioeventfd", True) == (accelerator == "kvm")
