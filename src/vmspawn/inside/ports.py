# SPDX-License-Identifier: LGPL-2.1-or-later
"""Attach byte streams to the guest as virtio-serial ports, and detach them.

A port appears in the guest as /dev/virtio-ports/NAME. Its host end is one of a socket pair: `shutdown(SHUT_WR)` on the
other end is the end of file in the guest, and detaching the port is the hang-up.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ..errors import NotConnected, VmspawnError
from ..hotplug import recovery
from ..hotplug.attachment import Attachment, State
from ..hotplug.hotplug import Hotplug
from ..hotplug.places import Pool, SerialPlace, serial_pool
from ..hotplug.qemu_objects import CHARDEV, DESCRIPTOR, QemuObject, device_ids
from ..hotplug.step import Make, PlugIn, Reserve, Step
from ..qmp.monitor import Command

#: Seconds that QEMU has to remove a port: it does not ask the guest.
DETACH_TIMEOUT = 20.0


@dataclass(slots=True, eq=False, repr=False)
class AttachedPort(Attachment):
    """A port. `number` is fresh for every port; `fd` is our copy of QEMU's end, until QEMU has its own."""

    kind: ClassVar[str] = "ports"

    number: int
    guest_name: str
    place: SerialPlace
    pool: Pool
    fd: int = -1

    @property
    def name(self) -> str:
        """The name among the ports."""
        return self.device

    @property
    def device(self) -> str:
        """The device's id in QEMU; that of the character device and of the descriptor, too."""
        return f"stream{self.number}"

    def steps(self) -> Sequence[Step]:
        """Place, descriptor, character device, device."""
        name = self.device
        address = {"type": "fd", "data": {"str": name}}
        backend = {"type": "socket", "data": {"addr": address, "server": False}}
        port = {"driver": "virtserialport", "id": name, "chardev": name, "name": self.guest_name}
        getfd = Command("getfd", {"fdname": name}, (self.fd,) if self.fd >= 0 else ())
        return (
            Reserve(self.place, self.pool),
            Make("descriptor", getfd, QemuObject(DESCRIPTOR, name)),
            Make("chardev", Command("chardev-add", {"id": name, "backend": backend}), QemuObject(CHARDEV, name)),
            PlugIn({**port, **self.place.properties()}),
        )

    def to_state(self) -> dict[str, Any]:
        """What another process needs to take the port over, as JSON values."""
        place = list(self.place)
        return {"number": self.number, "name": self.guest_name, "place": place, "state": self.state, "done": self.done}

    def vanished(self) -> VmspawnError:
        """The error of an attach whose port was removed meanwhile."""
        return NotConnected(f"the port {self.guest_name} was removed through QMP while it was being attached")

    def close(self) -> None:
        """Close our copy of QEMU's end. May be called again."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class Ports:
    """The hot-plugged ports of one virtio-serial controller."""

    def __init__(
        self, hotplug: Hotplug, controller: str, numbers: range, saved: Mapping[str, Mapping[str, Any]]
    ) -> None:
        """`numbers` are those of the controller that are free for ports. `saved` are the sections of the journal that
        another manager left. Raises KeyError, TypeError or ValueError if they cannot be understood.
        """
        self._hotplug = hotplug
        self._pool = serial_pool(controller, numbers)
        self._register = hotplug.register(AttachedPort.kind, self._load, saved.get(AttachedPort.kind, {}))

    def _load(self, saved: dict[str, Any]) -> AttachedPort:
        bus, number = saved["place"]
        place = SerialPlace(str(bus), int(number))
        done, state = [str(name) for name in saved["done"]], State(saved["state"])
        return AttachedPort(int(saved["number"]), str(saved["name"]), place, self._pool, done=done, state=state)

    def __iter__(self) -> Iterator[AttachedPort]:
        return iter(self._register)

    @property
    def free(self) -> int:
        """How many ports can still be attached."""
        return self._pool.free

    async def attach(self, guest_name: str) -> tuple[AttachedPort, socket.socket]:
        """Attach a port; returns it with our end of the stream, which the caller owns.

        Raises NoFreePort or what `Hotplug.attach` raises; then nothing is left behind.
        """
        place = self._pool.take()
        assert isinstance(place, SerialPlace)
        ours, theirs = socket.socketpair()
        port = AttachedPort(self._register.fresh_number(), guest_name, place, self._pool, theirs.detach())
        try:
            await self._hotplug.attach(port)
        except BaseException:
            ours.close()
            raise
        finally:
            port.close()
        return port, ours

    async def detach(self, port: AttachedPort) -> bool:
        """Detach a port; True once nothing of it is left. Raises NotConnected."""
        return await self._hotplug.detach(port, asyncio.get_running_loop().time() + DETACH_TIMEOUT)

    async def settle(self) -> None:
        """Settle the ports of another manager's journal. Raises Timeout or NotConnected."""
        devices = await device_ids(self._hotplug.monitor)
        await recovery.settle(self._hotplug, tuple(self._register), devices, lambda _: None)
        self._register.save()
