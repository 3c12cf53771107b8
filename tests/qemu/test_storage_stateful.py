# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests random operations on disks: after each step, the machine equals its model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from tests.conftest import MIB
from tests.qemu.qmp_fixtures import SCALE, scaled
from tests.qemu.storage_model import ExpectedDisk
from tests.qemu.storage_run import UNATTACHABLE, UNUSABLE, Run
from vmspawn.storage.limits import NO_LIMITS, Limits

#: Steps of one run, and runs at scale 1. At 10, the scale of `./dev soak`, there are 2000 steps.
STEPS = 40
RUNS = 5

NAMES = st.sampled_from(("a", "b", "c", "d", "e"))
FORMATS = st.sampled_from(("raw", "qcow2"))
SIZES = st.sampled_from((MIB, 2 * MIB, 3 * MIB, 3 * MIB + 512))
LIMITS = st.sampled_from((NO_LIMITS, Limits(iops=100_000), Limits(bps_read=1 << 30, iops_write=50_000, burst=2)))
BUSES = st.sampled_from(("virtio-blk", "nvme", "virtio-scsi", "nvme-ns", "scsi-cd", "empty-cd", "auto"))
OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "discard": st.just("ignore"),
        "detect_zeroes": st.just("on"),
        "limits": LIMITS,
        "read_only": st.booleans(),
    },
)
#: Selects one of the disks.
WHICH = st.integers(0, 9)


class StorageMachine(RuleBasedStateMachine):
    """Chooses the steps."""

    def __init__(self, qemu: str, folder: Path) -> None:
        super().__init__()
        self._ended_well = False
        self.run = Run(qemu, folder)

    def disk(self, which: int) -> ExpectedDisk:
        """Return a disk; attaches one first if the machine has no disk.

        No draw depends on the number of disks, because a reset of the firmware may remove disks at any time.
        """
        if not self.run.model.disks:
            self.run.attach("a", "virtio-scsi")
        disks = self.run.disks()
        return disks[which % len(disks)]

    def optical_disk(self, which: int) -> ExpectedDisk:
        """Return an optical drive if there is one, else another disk."""
        disks = self.run.disks("scsi-cd")
        return disks[which % len(disks)] if disks else self.disk(which)

    @rule(name=NAMES, bus=BUSES, image_format=FORMATS, size=SIZES, reuse=st.booleans(), options=OPTIONS)
    def attach(self, name: str, bus: str, image_format: str, size: int, reuse: bool, options: dict[str, Any]) -> None:
        self.run.attach(name, bus, image_format=image_format, size=size, reuse=reuse, **options)

    @rule(name=NAMES, bus=st.sampled_from(("virtio-blk", "virtio-scsi")), limits=LIMITS)
    def attach_with_a_thread(self, name: str, bus: str, limits: Limits) -> None:
        self.run.attach(name, bus, thread=True, limits=limits)

    @rule(which=WHICH, read_only=st.booleans())
    def attach_again(self, which: int, read_only: bool) -> None:
        self.run.attach_again(self.disk(which), read_only=read_only)

    @rule(what=st.sampled_from(UNATTACHABLE))
    def attach_invalid(self, what: str) -> None:
        self.run.attach_invalid(what)

    @rule(name=NAMES, flags=st.sampled_from((os.O_RDONLY, os.O_RDWR, os.O_WRONLY, os.O_PATH, os.O_RDWR | os.O_SYNC)))
    def attach_a_descriptor(self, name: str, flags: int) -> None:
        self.run.attach_descriptor(name, flags)

    @rule(which=WHICH, force=st.booleans())
    def detach(self, which: int, force: bool) -> None:
        self.run.detach(self.disk(which), force=force)

    @rule(which=WHICH)
    def remove_by_qmp(self, which: int) -> None:
        self.run.remove_by_qmp(self.disk(which))

    @rule(which=WHICH, image_format=FORMATS, size=SIZES, reuse=st.booleans(), shrink=st.booleans())
    def replace(self, which: int, image_format: str, size: int, reuse: bool, shrink: bool) -> None:
        self.run.replace(self.disk(which), image_format=image_format, size=size, reuse=reuse, shrink=shrink)

    @rule(which=WHICH, what=st.sampled_from(UNUSABLE))
    def replace_by_invalid(self, which: int, what: str) -> None:
        self.run.replace_by_invalid(self.disk(which), what)

    @rule(which=WHICH, size=SIZES, shrink=st.booleans())
    def resize(self, which: int, size: int, shrink: bool) -> None:
        self.run.resize(self.disk(which), size=size, shrink=shrink)

    @rule(which=WHICH, limits=LIMITS)
    def limit(self, which: int, limits: Limits) -> None:
        self.run.limit(self.disk(which), limits)

    @rule(which=WHICH, image_format=FORMATS, size=SIZES, force=st.booleans())
    def insert(self, which: int, image_format: str, size: int, force: bool) -> None:
        self.run.insert(self.optical_disk(which), image_format=image_format, size=size, force=force)

    @rule(which=WHICH, force=st.booleans())
    def eject(self, which: int, force: bool) -> None:
        self.run.eject(self.optical_disk(which), force=force)

    @rule()
    @precondition(lambda self: not self.run.paused)
    def pause(self) -> None:
        self.run.pause()

    @rule()
    @precondition(lambda self: self.run.paused)
    def resume(self) -> None:
        self.run.resume()

    @rule()
    def reset(self) -> None:
        self.run.reset()

    @invariant()
    def as_the_model_says(self) -> None:
        self._ended_well = False
        self.run.check()
        self._ended_well = True

    def teardown(self) -> None:
        self.run.end(check=self._ended_well)


@pytest.mark.scaled
@pytest.mark.slow
def test_after_any_operations_the_machine_equals_the_model(qemu: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    class Machine(StorageMachine):
        def __init__(self) -> None:
            super().__init__(qemu, tmp_path_factory.mktemp("images"))

    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=scaled(RUNS),
            stateful_step_count=STEPS,
            deadline=None,
            # The steps are the same in each usual run, and random in a soak.
            derandomize=SCALE == 1,
            suppress_health_check=list(HealthCheck),
        ),
    )


LIMITED = Limits(iops=100_000)
ATTACH: dict[str, Any] = {"name": "a", "image_format": "raw", "size": MIB, "reuse": False, "options": {}}
REPLACE: dict[str, Any] = {"which": 0, "image_format": "qcow2", "size": MIB, "reuse": False, "shrink": False}


@pytest.mark.parametrize(
    "steps",
    [
        pytest.param(
            (
                ("attach", {**ATTACH, "bus": "empty-cd"}),
                ("limit", {"which": 0, "limits": LIMITED}),
                ("insert", {"which": 0, "image_format": "raw", "size": MIB, "force": False}),
            ),
            id="a medium was inserted without the limits of its disk",
        ),
        pytest.param(
            (
                ("attach_with_a_thread", {"name": "a", "bus": "virtio-scsi", "limits": NO_LIMITS}),
                ("limit", {"which": 0, "limits": LIMITED}),
            ),
            id="QEMU crashed when a disk with an I/O thread was limited",
        ),
        pytest.param(
            (
                ("attach_with_a_thread", {"name": "a", "bus": "virtio-scsi", "limits": LIMITED}),
                ("replace", REPLACE),
                ("pause", {}),
                ("reset", {}),
            ),
            id="QEMU hung when a limited disk with an I/O thread got another image",
        ),
    ],
)
def test_former_failures_do_not_return(
    qemu: str, tmp_path: Path, steps: tuple[tuple[str, dict[str, Any]], ...]
) -> None:
    machine = StorageMachine(qemu, tmp_path)
    try:
        for name, arguments in steps:
            getattr(machine, name)(**arguments)
            machine.as_the_model_says()
    finally:
        machine.teardown()
