# SPDX-License-Identifier: LGPL-2.1-or-later
"""The SCSI controller with an I/O thread: plugged in for the first disk that wants one, and kept for the next.

It is an attachment as a disk is, of a kind that users do not see.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ..errors import NoSuchStorage, VmspawnError
from ..hotplug import recovery
from ..hotplug.attachment import Attachment, State
from ..hotplug.hotplug import Hotplug
from ..hotplug.places import THREADED_SCSI_CONTROLLER, Layout, PciPlace, Place, Pool, scsi_pool
from ..hotplug.qemu_objects import OBJECT, QemuObject
from ..hotplug.step import Make, PlugIn, Reserve, Step
from ..qmp.monitor import Command
from .saved import load_pci_place

#: The id of its thread.
CONTROLLER_THREAD = "scsi-thread"

#: Seconds that an adoption waits until a controller without a device is taken apart.
_UNWIND_TIMEOUT = 10.0


@dataclass(slots=True, eq=False)
class IothreadController(Attachment):
    """The controller."""

    kind: ClassVar[str] = "controllers"

    place: Place
    pool: Pool

    @property
    def name(self) -> str:
        """The name; there is one controller of this kind."""
        return THREADED_SCSI_CONTROLLER

    @property
    def device(self) -> str:
        """The device's id in QEMU."""
        return THREADED_SCSI_CONTROLLER

    def steps(self) -> Sequence[Step]:
        """Place, I/O thread, device."""
        thread = Command("object-add", {"qom-type": "iothread", "id": CONTROLLER_THREAD})
        device = {"driver": "virtio-scsi-pci", "id": self.device, "iothread": CONTROLLER_THREAD}
        return (
            Reserve(self.place, self.pool),
            Make("thread", thread, QemuObject(OBJECT, CONTROLLER_THREAD)),
            PlugIn({**device, **self.place.properties()}),
        )

    def to_state(self) -> dict[str, Any]:
        """What another process needs to take it over, as JSON values."""
        return {"place": list(self.place), "state": self.state.value, "done": self.done}

    def vanished(self) -> VmspawnError:
        """The error of an attach whose controller was removed meanwhile."""
        return NoSuchStorage("the SCSI controller was removed through QMP while it was being plugged in")


class IothreadControllers:
    """The controller, if there is one, and its targets."""

    def __init__(self, hotplug: Hotplug, layout: Layout, saved: Mapping[str, Mapping[str, Any]]) -> None:
        """`saved` are the sections of the journal. Raises KeyError, TypeError or ValueError."""
        self._hotplug = hotplug
        self._pool = layout.pci
        self._plugging = asyncio.Lock()
        self._register = hotplug.register(IothreadController.kind, self._load, self._section(saved))

    @staticmethod
    def _section(saved: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any]:
        """The section; managers without one had the controller's place alone, among the disks."""
        place = saved.get("storage", {}).get("threaded-scsi")
        if IothreadController.kind in saved or not place:
            return saved.get(IothreadController.kind, {})
        done = ["place", "thread", "device"]
        return {"attachments": [{"place": place, "state": State.ATTACHING.value, "done": done}]}

    def _load(self, saved: dict[str, Any]) -> IothreadController:
        done = [str(name) for name in saved["done"]]
        return IothreadController(load_pci_place(saved["place"]), self._pool, done=done, state=State(saved["state"]))

    def __iter__(self) -> Iterator[IothreadController]:
        return iter(self._register)

    @property
    def place(self) -> Place | None:
        """The controller's place, if there is a controller."""
        found = self._register.get(THREADED_SCSI_CONTROLLER)
        return found.place if found else None

    @functools.cached_property
    def targets(self) -> Pool:
        """The controller's targets."""
        return scsi_pool(THREADED_SCSI_CONTROLLER)

    async def plug_in(self) -> Pool:
        """The targets of the controller. The first call takes a port for it.

        Raises what `Hotplug.attach` raises and NoFreePort, and leaves nothing then.
        """
        async with self._plugging:
            found = self._register.get(THREADED_SCSI_CONTROLLER)
            if found is not None and found.unwinding is not None:
                await asyncio.wait({found.unwinding}, timeout=_UNWIND_TIMEOUT)
            if self.place is None:
                await self._hotplug.attach(IothreadController(self._pool.take(), self._pool))
        return self.targets

    async def settle(self, devices: frozenset[str], note: Callable[[str], None]) -> None:
        """Settle the controller after another manager. Raises Timeout or NotConnected."""
        if self.place is None and THREADED_SCSI_CONTROLLER in devices:
            await self._find()
        controllers = tuple(self._register)
        await recovery.settle(self._hotplug, controllers, devices, note)
        for each in controllers:
            if each.unwinding is not None:
                await asyncio.wait({each.unwinding}, timeout=_UNWIND_TIMEOUT)

    async def _find(self) -> None:
        """Ask QEMU where the controller is; a state of version 1 does not say it."""
        device = f"/machine/peripheral/{THREADED_SCSI_CONTROLLER}"
        bus = await self._hotplug.monitor.execute("qom-get", {"path": device, "property": "parent_bus"})
        address = await self._hotplug.monitor.execute("qom-get", {"path": device, "property": "addr"})
        place = PciPlace(str(bus).rpartition("/")[2], hex(int(address) >> 3))
        found = IothreadController(place, self._pool, state=State.ATTACHED)
        found.done = [step.name for step in found.steps()]
        found.settled.set()
        self._pool.claim(place)
        self._register.add(found)
