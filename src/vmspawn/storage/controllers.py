# SPDX-License-Identifier: LGPL-2.1-or-later
"""Plugs in the controllers of disks when the first disk needs one, and unplugs unused ones.

A controller is an attachment like a disk, of a kind that users do not see. There are three controllers:

1. The SCSI controller exists from boot. On pc the guest may eject it; then the next disk's attach plugs it in again.
2. The SCSI controller with an I/O thread is plugged in for the first disk with `thread`, and stays.
3. The controller of NVMe namespaces is plugged in for the first namespace and unplugged after the last, because
   QEMU 11.1 crashes when it saves the state of a controller without namespaces (docs/qemu.md, "Faults"). The controller
   exists from boot and stays if QEMU was started with a namespace, or by an older vmspawn.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final

from ..errors import NoFreePort, NoSuchStorage, StoragePending, VmspawnError
from ..hotplug import recovery
from ..hotplug.attachment import Attachment, State
from ..hotplug.hotplug import Hotplug
from ..hotplug.places import (
    NAMESPACE_CONTROLLER,
    SCSI_CONTROLLER,
    THREADED_SCSI_CONTROLLER,
    Layout,
    PciPlace,
    Place,
    Pool,
    controller_of,
    fixed_place,
    scsi_pool,
)
from ..hotplug.qemu_objects import OBJECT, QemuObject
from ..hotplug.step import Make, PlugIn, Reserve, Step
from ..qmp.monitor import Command
from . import buses
from .disk import Disk
from .saved import load_pci_place

#: The id of the threaded SCSI controller's I/O thread.
CONTROLLER_THREAD = "scsi-thread"

#: Seconds that an attach, or an adoption, waits for the removal of a controller.
_UNWIND_TIMEOUT = 10.0

_NAMES = (SCSI_CONTROLLER, THREADED_SCSI_CONTROLLER, NAMESPACE_CONTROLLER)

_LEAVING_HINT = "try again when the guest has released it, or use another bus"


@dataclass(slots=True, eq=False, repr=False)
class Controller(Attachment):
    """A controller, whose name is the device's id in QEMU."""

    kind: ClassVar[str] = "controllers"

    device_id: str
    place: Place
    pool: Pool

    @property
    def name(self) -> str:
        """The controller's name in the journal."""
        return self.device_id

    @property
    def device(self) -> str:
        """The device's id in QEMU."""
        return self.device_id

    def steps(self) -> Sequence[Step]:
        """Return the steps in order: place, I/O thread, device."""
        properties = buses.controller(self.device_id, self.place)
        if self.device_id != THREADED_SCSI_CONTROLLER:
            return (Reserve(self.place, self.pool), PlugIn(properties))
        thread = Command("object-add", {"qom-type": "iothread", "id": CONTROLLER_THREAD})
        return (
            Reserve(self.place, self.pool),
            Make("thread", thread, QemuObject(OBJECT, CONTROLLER_THREAD)),
            PlugIn({**properties, "iothread": CONTROLLER_THREAD}),
        )

    def to_state(self) -> dict[str, Any]:
        """Return the controller's record for state.json, from which another manager can adopt it."""
        return {"name": self.name, "place": list(self.place), "state": self.state.value, "done": self.done}

    def vanished(self) -> VmspawnError:
        """Return the error of an attach whose controller was removed meanwhile."""
        return NoSuchStorage(f"the controller {self.name} was removed through QMP while it was being plugged in")


class Controllers:
    """The controllers of a machine, and the pool of SCSI targets of the controller with an I/O thread."""

    def __init__(
        self,
        hotplug: Hotplug,
        layout: Layout,
        saved: Mapping[str, Mapping[str, Any]],
        at_boot: Iterable[str] = (),
    ) -> None:
        """Begin with the controllers that exist already.

        `saved` has the sections of an adopted machine's journal; `at_boot` names the controllers of a QEMU that was
        just started. Raises KeyError, TypeError or ValueError if a section is invalid.
        """
        self._hotplug = hotplug
        self._layout = layout
        self._plugging: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        #: The places on the controller with an I/O thread.
        self.targets: Final = scsi_pool(THREADED_SCSI_CONTROLLER)
        self._register = hotplug.register(Controller.kind, self._load, self._section(saved))
        for name in at_boot:
            self._add(name, fixed_place(layout, name))
        layout.namespaces.on_unused = self.release_unused

    @staticmethod
    def _section(saved: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any]:
        """Return the section of controllers.

        A manager without that section kept only the threaded controller's place, in the section of disks.
        """
        place = saved.get("storage", {}).get("threaded-scsi")
        if Controller.kind in saved or not place:
            return saved.get(Controller.kind, {})
        done = ["place", "thread", "device"]
        return {"attachments": [{"place": place, "state": State.ATTACHING.value, "done": done}]}

    def _load(self, saved: dict[str, Any]) -> Controller:
        done = [str(name) for name in saved["done"]]
        name = str(saved.get("name", THREADED_SCSI_CONTROLLER))
        place, state = load_pci_place(saved["place"]), State(saved["state"])
        return Controller(name, place, self._layout.pci, done=done, state=state)

    def _add(self, name: str, place: PciPlace) -> None:
        """Register a controller that exists."""
        found = Controller(name, place, self._layout.pci, state=State.ATTACHED)
        found.done = [step.name for step in found.steps()]
        found.settled.set()
        self._layout.pci.claim(place)
        self._register.add(found)

    def __iter__(self) -> Iterator[Controller]:
        return iter(self._register)

    def place_of(self, name: str) -> Place | None:
        """Return the place of a controller, or None if the controller does not exist."""
        found = self._register.get(name)
        return found.place if found else None

    def pool_of(self, bus: str, place: Place) -> Pool:
        """Return the pool that a disk's place is from."""
        match buses.TABLE[bus].pool:
            case "scsi":
                return self.targets if controller_of(place) == THREADED_SCSI_CONTROLLER else self._layout.scsi
            case "namespaces":
                return self._layout.namespaces
            case _:
                return self._layout.pci

    def is_there(self, place: Place) -> bool:
        """Return True if a place needs no controller, or if its controller is attached."""
        name = controller_of(place)
        found = self._register.get(name) if name else None
        return name is None or (found is not None and found.state is State.ATTACHED)

    async def plug_in(self, disk: Disk, place: Place) -> None:
        """Plug in a place's controller, if the place needs one and the controller is not attached.

        Raises what `Hotplug.attach` raises, NoFreePort, or StoragePending if the guest has not released the
        controller from an earlier use; leaves nothing behind then.
        """
        name = controller_of(place)
        if name is None:
            return
        async with self._plugging[name]:
            await self._wait_gone(name)
            if self._register.get(name) is not None:
                return
            # The new controller has no namespaces yet, and QEMU 11.1 would crash if it saved the state now.
            can_be_saved = name != NAMESPACE_CONTROLLER
            async with contextlib.nullcontext() if can_be_saved else self._hotplug.saving.device_comes():
                await self._hotplug.attach(Controller(name, self._take_place(disk, name), self._layout.pci))

    async def _wait_gone(self, name: str) -> None:
        found = self._register.get(name)
        if found is None or found.state is not State.DETACHING:
            return
        await asyncio.wait({self._hotplug.unwind(found)}, timeout=_UNWIND_TIMEOUT)
        if self._register.get(name) is found:
            raise StoragePending(
                f"the guest has not released the controller {name} after the last disk on it was detached",
                hint=_LEAVING_HINT,
            )

    def _take_place(self, disk: Disk, name: str) -> Place:
        if name == SCSI_CONTROLLER:
            return fixed_place(self._layout, name)
        try:
            return self._layout.pci.take()
        except NoFreePort as error:
            raise NoFreePort.with_fields(
                "cannot attach {disk} on bus {bus}: {reason}",
                hint="the first disk on this bus needs a port for its controller; {reason}",
                disk=disk.name,
                bus=disk.bus,
                reason=error,
            ) from None

    # Unplugging.

    def release_unused(self) -> None:
        """Unplug the controller of namespaces if it has no namespaces and was plugged in after boot."""
        found = self._register.get(NAMESPACE_CONTROLLER)
        if found is None or found.state is not State.ATTACHED or not self._layout.namespaces.is_unused:
            return
        if found.place != fixed_place(self._layout, NAMESPACE_CONTROLLER):
            self._hotplug.unwind(found)

    async def wait_released(self, place: Place, timeout: float) -> None:
        """Wait until a place's controller is removed, if its removal is under way."""
        found = self._register.get(controller_of(place) or "")
        if found is not None and found.unwinding is not None:
            await asyncio.wait({found.unwinding}, timeout=timeout)

    # Adoption.

    async def settle(self, devices: frozenset[str], note: Callable[[str], None]) -> None:
        """Reconcile the controllers of another manager's journal with QEMU. Raises Timeout or NotConnected."""
        for name in _NAMES:
            if self._register.get(name) is None and name in devices:
                await self._find(name)
        controllers = tuple(self._register)
        await recovery.settle(self._hotplug, controllers, devices, note)
        for each in controllers:
            if each.unwinding is not None:
                await asyncio.wait({each.unwinding}, timeout=_UNWIND_TIMEOUT)

    async def _find(self, name: str) -> None:
        """Read a controller's place from QEMU; the journals of older managers do not have it."""
        device = f"/machine/peripheral/{name}"
        bus = await self._hotplug.monitor.execute("qom-get", {"path": device, "property": "parent_bus"})
        address = await self._hotplug.monitor.execute("qom-get", {"path": device, "property": "addr"})
        self._add(name, PciPlace(str(bus).rpartition("/")[2], hex(int(address) >> 3)))
