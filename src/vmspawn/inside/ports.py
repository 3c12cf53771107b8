# SPDX-License-Identifier: LGPL-2.1-or-later
"""Attaches virtio-serial ports to the guest, connects streams to them, and detaches them.

A port appears in the guest as /dev/virtio-ports/NAME. A port is attached with a null character device. To connect a
stream, the manager lets QEMU replace this device by a socket; to disconnect the stream, by a null device again.
`shutdown(SHUT_WR)` on the host's end of a stream is the end of file in the guest.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ..errors import NotConnected, QmpError, Timeout, VmspawnError
from ..hotplug import recovery
from ..hotplug.attachment import Attachment, State
from ..hotplug.hotplug import Hotplug
from ..hotplug.places import Pool, SerialPlace, serial_pool
from ..hotplug.qemu_objects import CHARDEV, DESCRIPTOR, QemuObject, device_ids, remove_objects
from ..hotplug.step import PlugIn, Reserve, Step
from ..qmp.monitor import Command

#: Seconds within which QEMU must remove a port, for which QEMU does not ask the guest.
DETACH_TIMEOUT = 20.0

_NULL: Mapping[str, object] = {"type": "null", "data": {}}


class _Backend(Step):
    """Makes the character device. A manager that dies while it connects a stream leaves a descriptor as well."""

    __slots__ = ("_id",)

    def __init__(self, id: str) -> None:
        super().__init__("chardev")
        self._id = id

    def begin(self) -> Sequence[Command]:
        return (Command("chardev-add", {"id": self._id, "backend": _NULL}),)

    def objects(self) -> Sequence[QemuObject]:
        return (QemuObject(CHARDEV, self._id), QemuObject(DESCRIPTOR, self._id))


@dataclass(slots=True, eq=False, repr=False)
class AttachedPort(Attachment):
    """A virtio-serial port. Each port gets a `number` that no earlier port had.

    `is_idle` is True while no command uses the port. A copy of the machine keeps idle ports. Another manager of the
    same machine keeps none, because its journal may be outdated: it is not written when a command takes a port.
    """

    kind: ClassVar[str] = "ports"

    number: int
    guest_name: str
    place: SerialPlace
    pool: Pool
    is_idle: bool = False

    @property
    def name(self) -> str:
        """The port's name, unique among the ports: the id of its device."""
        return self.device

    @property
    def device(self) -> str:
        """The id in QEMU of the device, of its character device, and of its descriptor."""
        return f"stream{self.number}"

    def steps(self) -> Sequence[Step]:
        """Return the steps: place, character device, device."""
        name = self.device
        port = {"driver": "virtserialport", "id": name, "chardev": name, "name": self.guest_name}
        return (Reserve(self.place, self.pool), _Backend(name), PlugIn({**port, **self.place.properties()}))

    def to_state(self) -> dict[str, Any]:
        """Return the record with which another manager takes over the port, as JSON values."""
        return {
            "number": self.number,
            "name": self.guest_name,
            "place": list(self.place),
            "state": self.state,
            "done": self.done,
            "idle": self.is_idle,
        }

    def vanished(self) -> VmspawnError:
        """Return the error of an attach whose port was removed meanwhile."""
        return NotConnected(f"the port {self.guest_name} was removed through QMP while it was being attached")


@dataclass(frozen=True, slots=True)
class Stream:
    """A stream to the guest: the client's end, and a copy of QEMU's end, which shows when the client closes its end."""

    ours: socket.socket
    theirs: socket.socket

    def close(self) -> None:
        """Close both ends. May be called again."""
        self.ours.close()
        self.theirs.close()


class Ports:
    """The hot-plugged ports of one virtio-serial controller."""

    def __init__(
        self, hotplug: Hotplug, controller: str, numbers: range, saved: Mapping[str, Mapping[str, Any]]
    ) -> None:
        """Take over the ports in `saved`, the sections of the journal that another manager left.

        `numbers` are the controller's numbers that ports may use. Raises KeyError, TypeError or ValueError if the
        sections are invalid.
        """
        self._hotplug = hotplug
        self._pool = serial_pool(controller, numbers)
        self._register = hotplug.register(AttachedPort.kind, self._load, saved.get(AttachedPort.kind, {}))

    def _load(self, saved: dict[str, Any]) -> AttachedPort:
        bus, number = saved["place"]
        place = SerialPlace(str(bus), int(number))
        done, state = [str(name) for name in saved["done"]], State(saved["state"])
        is_idle = bool(saved.get("idle"))
        return AttachedPort(
            int(saved["number"]), str(saved["name"]), place, self._pool, is_idle, done=done, state=state
        )

    def __iter__(self) -> Iterator[AttachedPort]:
        return iter(self._register)

    async def attach(self, guest_name: str) -> AttachedPort:
        """Attach a port. Raises NoFreePort or an error of `Hotplug.attach`; then nothing is left behind."""
        place = self._pool.take()
        assert isinstance(place, SerialPlace)
        port = AttachedPort(self._register.fresh_number(), guest_name, place, self._pool)
        await self._hotplug.attach(port)
        return port

    def set_idle(self, ports: Iterable[AttachedPort], is_idle: bool) -> None:
        """Record whether a command has the ports. The journal is not written."""
        for port in ports:
            port.is_idle = is_idle
            self._register.changed(port)

    async def connect(self, ports: Sequence[AttachedPort]) -> list[Stream]:
        """Connect a stream to each of the ports, which must not have one. The caller closes the streams.

        Raises the errors of `Monitor.execute`; then no stream is open.
        """
        streams = [Stream(*socket.socketpair()) for _ in ports]
        try:
            await self._change(
                [
                    command
                    for port, stream in zip(ports, streams, strict=True)
                    for command in _connect(port.device, stream.theirs)
                ]
            )
        except BaseException:
            for stream in streams:
                stream.close()
            # QEMU keeps a descriptor that it has not used.
            with contextlib.suppress(NotConnected, Timeout):
                await remove_objects(self._hotplug.monitor, [QemuObject(DESCRIPTOR, port.device) for port in ports])
            raise
        return streams

    async def disconnect(self, ports: Sequence[AttachedPort]) -> None:
        """Close QEMU's ends of the ports' streams, and discard unread data in both directions.

        Raises the errors of `Monitor.execute`.
        """
        await self._change([Command("chardev-change", {"id": port.device, "backend": _NULL}) for port in ports])

    async def _change(self, commands: Sequence[Command]) -> None:
        for result in await self._hotplug.monitor.execute_all(commands):
            if isinstance(result, QmpError):
                raise result

    async def detach(self, port: AttachedPort) -> bool:
        """Detach a port. Returns True if nothing of the port is left, False after a timeout. Raises NotConnected."""
        return await self._hotplug.detach(port, asyncio.get_running_loop().time() + DETACH_TIMEOUT)

    async def settle(self) -> None:
        """Complete or undo the operations on ports that another manager began. Raises Timeout or NotConnected."""
        devices = await device_ids(self._hotplug.monitor)
        await recovery.settle(self._hotplug, tuple(self._register), devices, lambda _: None)
        self._register.save()


def _connect(id: str, theirs: socket.socket) -> tuple[Command, Command]:
    address = {"type": "fd", "data": {"str": id}}
    backend = {"type": "socket", "data": {"addr": address, "server": False}}
    return (
        Command("getfd", {"fdname": id}, (theirs.fileno(),)),
        Command("chardev-change", {"id": id, "backend": backend}),
    )
