# SPDX-License-Identifier: LGPL-2.1-or-later
"""Writes QEMU's command line. Each group of options has a function."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence

from ..hotplug import places
from ..record import Record
from ..storage import buses
from . import console, memory
from .boot_disk import BootDisk
from .config import MachineConfig
from .extras import Extras
from .overlay import BASE_FDSET
from .plan import Kernel, Plan
from .qemu import QemuBinary
from .sandbox import sandbox


class Inherited(Record):
    """Descriptors that QEMU inherits: the listening sockets of the monitors, by name, of the console's size port and of
    the agent's port, and the console's log. `size`, `agent` and `log` are -1 if they do not exist."""

    monitors: Mapping[str, int]
    size: int
    agent: int
    log: int


def disk_arguments(disks: Sequence[BootDisk]) -> list[str]:
    """Return QEMU's arguments for disks."""
    return [*_disks(disks)]


def monitor_arguments(binary: QemuBinary, sockets: Mapping[str, int]) -> list[str]:
    """Return QEMU's arguments for its monitors, whose sockets it inherits."""
    return [*_monitors(binary, sockets)]


def command_line(plan: Plan, inherited: Inherited) -> list[str]:
    """Write QEMU's whole command line."""
    config = plan.config
    return [
        plan.binary.path,
        *_identity(config),
        *sandbox(plan.binary, config),
        *_hardware(config, plan.accelerator, plan.extras),
        *_generation(config),
        *_monitors(plan.binary, inherited.monitors),
        *_controllers(plan.layout, plan.disks),
        *plan.extras.arguments,
        *console.devices(config, plan.accelerator, inherited.size, inherited.agent, inherited.log),
        *_disks(plan.disks),
        *_kernel(plan.kernel),
        *config.qemu_arguments,
    ]


def _identity(config: MachineConfig) -> list[str]:
    uuid = ["-uuid", _dashed(config.uuid)] if config.uuid else []
    return ["-name", f"{config.name},process=vmspawn-qemu", *uuid, "-no-user-config", "-nodefaults"]


def _dashed(uuid: str) -> str:
    digits = uuid.replace("-", "").lower()
    return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))


# The options of the machine types; GICv3 allows an aarch64 guest more than eight processors.
_MACHINES = {"q35": "q35", "pc": "pc", "virt": "virt,gic-version=3"}


# A guest whose processor has ERMS or FSRM copies by `rep movsb`, which TCG emulates byte by byte. Both are disabled,
# because a guest with FSRM alone does not boot.
_EMULATED_X86 = "max,erms=off,fsrm=off"
_EMULATED_CPUS = {"q35": _EMULATED_X86, "pc": _EMULATED_X86, "virt": "max"}


def _hardware(config: MachineConfig, accelerator: str, extras: Extras) -> list[str]:
    return [
        *("-machine", ",".join((_MACHINES[config.machine_type], f"accel={accelerator}", *extras.machine))),
        *("-cpu", "host" if accelerator == "kvm" else _EMULATED_CPUS[config.machine_type]),
        *("-smp", str(config.cpus)),
        *("-m", memory.size_argument(config.ram_bytes, config.ram_growth)),
    ]


def _generation(config: MachineConfig) -> list[str]:
    """Return the device that tells the guest's kernel that the guest is a copy, so that the kernel reseeds its random
    numbers.
    """
    # aarch64's virt has no such device before QEMU 9.1.
    return [] if config.machine_type == "virt" else ["-device", "vmgenid,id=vmgenid0,guid=auto"]


def _monitors(binary: QemuBinary, sockets: Mapping[str, int]) -> Iterable[str]:
    for name, fd in sockets.items():
        yield from ("-chardev", f"socket,id={name},fd={fd},server=on,wait=off")
        if binary.has_monitor_object:
            yield from ("-object", f"monitor-qmp,id={name}-monitor,chardev={name}")
        else:
            yield from ("-mon", f"chardev={name},mode=control")


def _controllers(layout: places.Layout, disks: Sequence[BootDisk]) -> Iterable[str]:
    rng = {"driver": "virtio-rng-pci", "id": "rng0", "bus": layout.bus, "addr": hex(places.RNG_SLOT)}
    # The console's devices are the other functions of the random number generator's slot.
    devices = [{**rng, "multifunction": True}, *places.port_devices(layout.ports)]
    names = buses.controllers_at_boot(each.disk.bus for each in disks)
    devices += (buses.controller(name, places.fixed_place(layout, name)) for name in names)
    for device in devices:
        yield from ("-device", json.dumps(device))


def _disks(disks: Sequence[BootDisk]) -> Iterable[str]:
    for each in disks:
        for image in (image for top in each.images for image in top.chain):
            assert image.backing is not None
            yield from ("-add-fd", f"fd={image.backing.fd},set={image.fdset}")
        if each.below is not None:
            yield from ("-add-fd", f"fd={each.below.fd},set={BASE_FDSET}", "-blockdev", json.dumps(each.below.node))
        for made in each.objects():
            yield from ("-object", json.dumps(made))
        for node in each.nodes():
            yield from ("-blockdev", json.dumps(node))
        yield from ("-device", json.dumps(each.device()))


def _kernel(kernel: Kernel | None) -> list[str]:
    if kernel is None:
        return []
    initrd = ["-initrd", kernel.initrd] if kernel.initrd else []
    arguments = ["-append", " ".join(kernel.arguments)] if kernel.arguments else []
    return ["-kernel", kernel.path, *initrd, *arguments]
