# SPDX-License-Identifier: LGPL-2.1-or-later
"""Allocates the places where devices can be plugged in: ports, slots, SCSI targets, namespaces and serial ports.

QEMU's own choice of a place is not reliable (docs/qemu.md, "Ports and slots"). QEMU 7.2 puts a second device on an
occupied port, and the guest loses both. QEMU 11.1 finds no slot on `pc`, although some are free. So vmspawn chooses
every place itself.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable

from ..errors import NoFreePort, UsageError
from ..record import Record


class PciPlace(Record):
    """A PCI address: `addr` is the slot on `bus`. Behind a root port, the only slot is 0x0."""

    bus: str
    addr: str

    def properties(self) -> dict[str, object]:
        """Return the properties of device_add that put a device at this place."""
        return {"bus": self.bus, "addr": self.addr}

    def __str__(self) -> str:
        return self.bus if self.addr == "0x0" else f"{self.bus}:{self.addr}"


class ScsiPlace(Record):
    """A target and LUN on a SCSI controller."""

    bus: str
    target: int
    lun: int

    def properties(self) -> dict[str, object]:
        """Return the properties of device_add that put a device at this place."""
        return {"bus": self.bus, "scsi-id": self.target, "lun": self.lun}

    def __str__(self) -> str:
        return f"{self.bus.removesuffix('.0')}:{self.target}:{self.lun}"


class NamespacePlace(Record):
    """A namespace of an NVMe controller."""

    bus: str
    nsid: int

    def properties(self) -> dict[str, object]:
        """Return the properties of device_add that put a device at this place."""
        return {"bus": self.bus, "nsid": self.nsid}

    def __str__(self) -> str:
        return f"{self.bus}:{self.nsid}"


class SerialPlace(Record):
    """A port of a virtio-serial controller."""

    bus: str
    number: int

    def properties(self) -> dict[str, object]:
        """Return the properties of device_add that put a device at this place."""
        return {"bus": self.bus, "nr": self.number}

    def __str__(self) -> str:
        return f"{self.bus.removesuffix('.0')}:{self.number}"


Place = PciPlace | ScsiPlace | NamespacePlace | SerialPlace


class Pool:
    """Places of one kind.

    A pool hands out the place that has been free the longest, so that a guest that is slow to notice a removal does not
    find another device at the same place.
    """

    __slots__ = ("_foreign", "_free", "_hint", "_what", "on_unused", "places")

    def __init__(self, places: Iterable[Place], what: str, hint: str) -> None:
        self.places = tuple(places)
        self._free = deque(self.places)
        # The places of devices that QMP clients have plugged in.
        self._foreign: set[Place] = set()
        self._what = what
        self._hint = hint
        #: Called when no place is in use any more.
        self.on_unused: Callable[[], None] | None = None

    @property
    def free(self) -> int:
        """The number of free places."""
        return len(self._free)

    @property
    def is_unused(self) -> bool:
        """True if all places are free."""
        return len(self._free) == len(self.places)

    def take(self) -> Place:
        """Reserve a place. Raises NoFreePort if none is free."""
        self._check_free()
        return self._free.popleft()

    def take_for(self, name: str) -> Place:
        """Reserve the place that a name's checksum selects, or the next free one. Raises NoFreePort."""
        from zlib import crc32

        self._check_free()
        first = crc32(name.encode()) % len(self.places)
        place = next(place for place in (*self.places[first:], *self.places[:first]) if place in self._free)
        self._free.remove(place)
        return place

    def _check_free(self) -> None:
        if not self._free:
            raise NoFreePort.with_fields(
                "no free {place}: {count}", hint=self._hint, place=self._what, count=self._count()
            )

    def _count(self) -> str:
        return f"all {len(self.places)} are in use" if self.places else "this machine has none"

    def claim(self, place: Place) -> None:
        """Reserve a place that a device already uses. Reserving it twice is harmless."""
        if place in self._free:
            self._free.remove(place)

    def note_occupied(self, occupied: Collection[Place]) -> None:
        """Update the pool from QEMU's devices: an occupied place that is free in the pool has a client's device."""
        for place in self._foreign.difference(occupied):
            self._foreign.remove(place)
            self.release(place)
        found = [place for place in self._free if place in occupied]
        self._foreign.update(found)
        for place in found:
            self._free.remove(place)

    def is_foreign(self, place: Place) -> bool:
        """Return whether a QMP client's device is known to be at a place."""
        return place in self._foreign

    def release(self, place: Place) -> None:
        """Give a place back to the pool. Giving it back twice is harmless."""
        if place in self.places and place not in self._free:
            self._free.append(place)
            if self.on_unused is not None and self.is_unused:
                self.on_unused()


# The layout of pcie.0 on q35 and of pci.0 on pc. Slot 0 has the host bridge; slot 1 is for a display on q35, and has
# the PIIX3 functions on pc; slot 31 has q35's ICH9. The fixed slots below are reserved even if their devices do not
# exist, so that the addresses of other devices do not change.
SCSI_CONTROLLER_SLOT = 2
RNG_SLOT = 3
NAMESPACE_CONTROLLER_SLOT = 4
FIRST_PORT_SLOT = 5
PORTS_PER_SLOT = 8

#: QEMU 7.2 and 11.1 boot guests with 120 ports. With 200 ports and one CPU, the guest runs out of interrupts
#: (docs/qemu.md, "Ports and slots").
HOTPLUG_PORTS_MAX = 120
#: Each port makes the guest boot slower: 8 ports cost 0.3 s of 3 s under TCG (docs/qemu.md, "Ports and slots").
HOTPLUG_PORTS_DEFAULT = 8

_LAST_SLOT_Q35 = 30
_LAST_SLOT_PC = 31

SCSI_CONTROLLER = "scsi0"
#: The controller that is plugged in for disks with an I/O thread.
THREADED_SCSI_CONTROLLER = "scsi1"
#: A virtio-scsi target id is one byte.
SCSI_TARGETS = 256

NAMESPACE_CONTROLLER = "nvme0"
#: QEMU's limit (hw/nvme/nvme.h, NVME_MAX_NAMESPACES).
NAMESPACES = 256


#: The slots of the controllers that can exist from boot. The controller for disks with an I/O thread never exists from
#: boot.
_FIXED_SLOTS = {SCSI_CONTROLLER: SCSI_CONTROLLER_SLOT, NAMESPACE_CONTROLLER: NAMESPACE_CONTROLLER_SLOT}

#: The error for a disk on bus nvme-ns if the machine has no namespaces.
NO_NAMESPACES = "this QEMU cannot plug in NVMe namespaces while the machine runs"
NO_NAMESPACES_HINT = "use bus nvme, which takes a port for each disk, or QEMU 11.1"


class Layout(Record):
    """The places of a machine, for boot devices and for hot-plugged devices.

    `bus` is the PCI bus of the devices at fixed slots, `ports` the number of root ports for hot-plug, 0 on pc.
    """

    bus: str
    boot: Pool
    pci: Pool
    scsi: Pool
    namespaces: Pool
    ports: int


def layout(machine_type: str, hotplug_ports: int | None, *, namespaces: bool = False) -> Layout:
    """Lay out a machine. `hotplug_ports` None is the default number; `namespaces` reserves NVMe namespaces.

    Raises UsageError if the machine cannot have that many ports.
    """
    scsi = scsi_pool(SCSI_CONTROLLER)
    nsids = range(1, NAMESPACES + 1) if namespaces else ()
    nvme = Pool((NamespacePlace(NAMESPACE_CONTROLLER, nsid) for nsid in nsids), "NVMe namespace", "detach a disk first")
    if machine_type == "pc":
        return _layout_pc(hotplug_ports, scsi, nvme)
    return _layout_pcie(hotplug_ports, scsi, nvme)


def fixed_place(layout: Layout, controller: str) -> PciPlace:
    """Return the place of a controller that QEMU starts with."""
    return PciPlace(layout.bus, hex(_FIXED_SLOTS[controller]))


def controller_of(place: Place) -> str | None:
    """Return the id of a place's controller, or None for a place on PCI."""
    return None if isinstance(place, PciPlace) else place.bus.removesuffix(".0")


def scsi_pool(controller: str) -> Pool:
    """Return the pool of a SCSI controller's targets."""
    places = (ScsiPlace(f"{controller}.0", target, 0) for target in range(SCSI_TARGETS))
    return Pool(places, "SCSI target", "detach a disk first")


def serial_pool(controller: str, numbers: range) -> Pool:
    """Return the pool of a virtio-serial controller's ports with these numbers."""
    places = (SerialPlace(f"{controller}.0", number) for number in numbers)
    return Pool(
        places, "virtio-serial port", "wait until a command has ended, or unplug ports that QMP clients plugged in"
    )


def _layout_pcie(hotplug_ports: int | None, scsi: Pool, namespaces: Pool) -> Layout:
    count = HOTPLUG_PORTS_DEFAULT if hotplug_ports is None else hotplug_ports
    if not 0 <= count <= HOTPLUG_PORTS_MAX:
        raise UsageError.with_fields(
            "{hotplug_ports={count}} is out of range", hint="use 0 to {most}", count=count, most=HOTPLUG_PORTS_MAX
        )
    ports = Pool((PciPlace(f"port{n}", "0x0") for n in range(count)), "hot-plug port", _MORE_PORTS)
    first_boot_slot = FIRST_PORT_SLOT + -(-count // PORTS_PER_SLOT)
    # From the top down, so that a boot disk's address does not depend on the number of ports.
    slots = range(_LAST_SLOT_Q35, first_boot_slot - 1, -1)
    boot = Pool((PciPlace("pcie.0", hex(slot)) for slot in slots), "PCI slot for disks at boot", "use fewer disks")
    return Layout("pcie.0", boot, ports, scsi, namespaces, count)


def _layout_pc(hotplug_ports: int | None, scsi: Pool, namespaces: Pool) -> Layout:
    slots = range(FIRST_PORT_SLOT, _LAST_SLOT_PC + 1)
    count = len(slots) if hotplug_ports is None else hotplug_ports
    if not 0 <= count <= len(slots):
        raise UsageError.with_fields(
            "{hotplug_ports={count}} is out of range for the machine type pc",
            hint="use 0 to {most}, or {machine_type=q35}, which takes up to {more}",
            count=count,
            most=len(slots),
            more=HOTPLUG_PORTS_MAX,
        )
    places = [PciPlace("pci.0", hex(slot)) for slot in slots]
    pci = Pool(places[:count], "PCI slot", _MORE_PORTS)
    # Boot disks and hot-plugged disks share the bus: a slot that is claimed at boot is taken from the hot-plug pool
    # too.
    boot = Pool(reversed(places), "PCI slot for disks at boot", "use fewer disks, or {machine_type=q35}")
    return Layout("pci.0", boot, pci, scsi, namespaces, 0)


_MORE_PORTS = "detach a disk, use bus virtio-scsi, or start the machine with a larger {hotplug_ports=}"


def port_devices(count: int) -> list[dict[str, object]]:
    """Return the device properties of a PCIe machine's root ports for hot-plug, packed eight to a slot."""
    return [
        {
            "driver": "pcie-root-port",
            "id": f"port{n}",
            "bus": "pcie.0",
            "addr": f"{FIRST_PORT_SLOT + n // PORTS_PER_SLOT:#x}.{n % PORTS_PER_SLOT:#x}",
            "multifunction": True,
            "chassis": n + 1,
            "slot": n,
        }
        for n in range(count)
    ]
