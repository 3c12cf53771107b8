# SPDX-License-Identifier: LGPL-2.1-or-later
"""Finds the reasons why a machine cannot be saved, before the guest is paused.

QEMU lists some reasons (`query-migrate`, blocked-reasons). Other reasons are the state of the guest, a disk's
state or bus, a running job, and devices and objects that vmspawn did not make, because a copy would lack them.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

from ..boot import incoming
from ..boot.incoming import Option
from ..hotplug.attachment import State
from ..hotplug.places import NAMESPACE_CONTROLLER
from ..hotplug.qemu_objects import children
from ..machine.loading import UNDER_WAY
from ..machine.run_states import RULES, Rule
from ..machine.running import Running

#: The ids of devices that vmspawn makes.
_DEVICES = re.compile(r"scsi[01]|rng0|port\d+|nvme0|serial|console-size|network0|drive\d+|vmgenid0|agent\d*|stream\d+")

#: The drivers of vmspawn's devices that have no id.
_ANONYMOUS = ("pvpanic-pci", "virtconsole", "virtio-keyboard-pci", "virtio-vga", "virtio-gpu-pci")

#: The names of objects that vmspawn or QEMU makes.
_OBJECTS = re.compile(
    r"type|limits\d+|drive\d+-(limits|thread)|scsi-thread|qmp-[a-z]+-monitor|compat_monitor\d+|mem|ram|[a-z-]+\.ram"
)

#: The run states to which QEMU can return after a save.
_STATES = ("running", "paused")

_DETACH = "detach it first: vmctl detach-disk {machine} {name}"


class Blocker(NamedTuple):
    """A reason why a machine cannot be saved, a hint, and the name of the disk if a disk is the reason."""

    reason: str
    hint: str = ""
    disk: str = ""


async def find(machine: Running, options: tuple[Option, ...]) -> list[Blocker]:
    """Find all blockers. `options` are those of QEMU's command line. Raises what `Monitor.execute` raises."""
    found = [*_of_the_start(machine, options)]
    async for each in _in_qemu(machine, options):
        found.append(each)
    return found


def _of_the_start(machine: Running, options: tuple[Option, ...]) -> list[Blocker]:
    found = []
    if machine.config.console == "native":
        found.append(Blocker("its console is QEMU's own (native)", "start it with another console"))
    tags = [str(each["tag"]) for each in incoming.devices(options) if each.get("driver") == "vhost-user-fs-pci"]
    # A manager that has adopted the machine knows only the tags.
    for name in [each.source for each in machine.config.binds] or tags:
        reason = f"directory {name} of the host is shared with it by virtiofs, which cannot be saved"
        found.append(Blocker(reason, "start it without the directory, and attach a disk or copy the files instead"))
    return found


async def _in_qemu(machine: Running, options: tuple[Option, ...]) -> AsyncIterator[Blocker]:
    monitor = machine.monitor
    # Some changes of the state, such as those by a migration, have no event.
    status = await machine.run_state.ask()
    if status not in _STATES:
        yield _of_the_state(machine, status)
    for disk in machine.storage:
        # An attach that waits for the end of the save has done nothing yet.
        if disk.state not in (State.ATTACHED, State.ATTACHING):
            hint = f"wait until the guest releases it: vmctl detach-disk {machine.name} {disk.name}"
            yield Blocker(f"disk {disk.name} is {disk.state}", hint if disk.removal else "", disk.name)
    for each in _disks_on_namespaces(machine):
        yield each
    devices = await children(monitor, "/machine/peripheral") - {"type"}
    if NAMESPACE_CONTROLLER in devices and not any(d.disk.bus == "nvme-ns" for d in machine.storage):
        yield Blocker("QEMU cannot save its NVMe controller, which has no namespace", "start the machine again")
    migration = await monitor.execute("query-migrate")
    if migration.get("status") in UNDER_WAY:
        yield Blocker("a migration is under way", "wait for its end, or end it through QMP (migrate_cancel)")
    for reason in migration.get("blocked-reasons", ()):
        for blocker in _explained(machine, str(reason)):
            yield blocker
    for name in sorted(devices):
        if not _DEVICES.fullmatch(name):
            yield Blocker(
                f"vmspawn did not create device {name}, and a copy would lack it",
                f"remove it through QMP (device_del {name}), or start the machine without it",
            )
    anonymous = len(await children(monitor, "/machine/peripheral-anon") - {"type"})
    ours = sum("id" not in each and each.get("driver") in _ANONYMOUS for each in incoming.devices(options))
    if anonymous > ours:
        yield Blocker(
            "a device that has no id was not created by vmspawn, and a copy would lack it",
            "start the machine without it",
        )
    for name in sorted(await children(monitor, "/objects")):
        if not _OBJECTS.fullmatch(name):
            yield Blocker(
                f"vmspawn did not create object {name}, and a copy would lack it",
                f"remove it through QMP (object-del {name}), or start the machine without it",
            )
    for query, what, command in (
        ("query-jobs", "job", "job-cancel"),
        ("query-block-exports", "block export", "block-export-del"),
    ):
        running: list[dict[str, Any]] = await monitor.execute(query)
        for job in running:
            hint = f"wait for its end, or end it through QMP ({command} {job['id']})"
            yield Blocker(f"{what} {job['id']} is under way", hint)


def _of_the_state(machine: Running, status: str) -> Blocker:
    resume = RULES["resume"].get(status, Rule("cont"))
    hint = resume.hint if resume.is_refused else f"resume or pause the machine first: vmctl resume {machine.name}"
    return Blocker(f"its guest is in state {status}", hint)


def _disks_on_namespaces(machine: Running) -> list[Blocker]:
    return [
        Blocker(
            f"disk {each.name} is on bus nvme-ns, which QEMU cannot save",
            _DETACH.format(machine=machine.name, name=each.name),
            each.name,
        )
        for each in machine.storage
        if each.disk.bus == "nvme-ns"
    ]


def _explained(machine: Running, reason: str) -> list[Blocker]:
    """Return the blockers for one of QEMU's reasons: one for each disk that the reason names."""
    if reason.rstrip("'").endswith("/nvme"):
        disks = [each.name for each in machine.storage if each.disk.bus == "nvme"]
        if disks:
            return [
                Blocker(
                    f"disk {name} is on bus nvme, which this QEMU cannot save",
                    _DETACH.format(machine=machine.name, name=name),
                    name,
                )
                for name in disks
            ]
    return [Blocker(reason)]
