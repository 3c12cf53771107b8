# SPDX-License-Identifier: LGPL-2.1-or-later
"""Defines the Varlink interfaces of a machine.

`io.systemd.MachineInstance` and `io.systemd.VirtualMachineInstance` are exactly those of systemd 262.
`io.vmspawn.Machine` has vmspawn's other features. Names are in Varlink's case because they are part of the protocol.
"""

import os
import typing
from collections.abc import AsyncIterator
from functools import partial

from asyncvarlink import FileDescriptor, VarlinkInterface, varlinkmethod
from asyncvarlink.serviceerrors import InvalidParameter

from ..aio.threads import open_in_thread
from ..errors import BadConfig, EventsLost, NotConnected, UsageError
from ..inside.conditions import OF_CLIENT, parse
from ..inside.inside import Inside
from ..machine.recent_events import Entry
from ..machine.running import Running
from ..storage.backing import Backing, take_descriptor
from ..storage.disk import AUTO_BUS, DEFAULT_BUS, Disk, check_bus, is_only_read
from ..storage.disk_views import DiskView
from ..timeouts import COMMAND_START_TIMEOUT, DETACH_TIMEOUT, TRAY_TIMEOUT
from . import errors, qmp, snapshot_types
from .forwards import PortForward, to_forward
from .progress import Progress
from .storage import Storage, StorageLimits, describe, to_limits, with_options
from .types import varlink_type
from .upgrade import Taker, upgradable

# asyncvarlink evaluates annotations, so this module cannot use `from __future__ import annotations`.

_MICROSECONDS = 1_000_000
#: The event in the first reply to SubscribeEvents: the client will get all later events.
READY = "READY"


class _Description(typing.TypedDict):
    running: bool
    status: str


class _Event(typing.TypedDict):
    event: str
    data: typing.NotRequired[typing.Any]


def _take(descriptor: FileDescriptor) -> int:
    """Take a received descriptor out of its message. The caller owns the returned descriptor."""
    taken = descriptor.take()
    if not isinstance(taken, int):
        raise BadConfig("the descriptor was used already")
    return taken


async def _backing(descriptor: FileDescriptor, *, read_only: bool | None) -> Backing:
    """Return the Backing of a received descriptor. The caller owns the Backing; on failure the descriptor is closed."""
    fd = _take(descriptor)
    take = partial(take_descriptor, fd, read_only=read_only)
    return await open_in_thread(take, Backing.close, on_no_thread=partial(os.close, fd))


def _is_read_only(machine: Running, name: str) -> bool | None:
    """Return True if a disk is read-only, so that its new image must be read-only too; else None."""
    return any(each.name == name and each.read_only for each in machine.storage) or None


def _tray_timeout(microseconds: int | None) -> float:
    """Return the seconds within which a guest must open a locked tray. Raises InvalidParameter."""
    if microseconds is not None and microseconds < 0:
        raise InvalidParameter(parameter="timeoutUSec")
    return TRAY_TIMEOUT if microseconds is None else microseconds / _MICROSECONDS


class MachineInstance(VarlinkInterface, name=errors.MACHINE_INSTANCE):
    """Control of one running machine, as systemd defines it."""

    errors = errors.MACHINE_INSTANCE_ERRORS

    def __init__(self, machine: Running) -> None:
        self._machine = machine

    @varlinkmethod
    async def Terminate(self) -> None:
        """End the machine at once, without asking the guest."""
        await self._machine.terminate()

    @varlinkmethod
    async def PowerOff(self) -> None:
        """Press the power button."""
        await self._machine.power.power_off()

    @varlinkmethod
    async def Reboot(self) -> None:
        """Press the reset button."""
        await self._machine.power.reboot()

    @varlinkmethod
    async def Pause(self) -> None:
        """Stop the guest's processors."""
        await self._machine.power.pause()

    @varlinkmethod
    async def Resume(self) -> None:
        """Continue the guest's processors."""
        await self._machine.power.resume()

    @varlinkmethod
    async def Describe(self) -> _Description:
        """Return QEMU's run state."""
        await self._machine.ask_status()
        return {"running": self._machine.is_running, "status": self._machine.status}

    @varlinkmethod(allow_foreign=True, delay_generator=False)
    async def SubscribeEvents(self, *, filter: list[str] | None = None) -> AsyncIterator[_Event]:
        """Stream the events of QEMU and vmspawn. Without a filter, or with an empty one, stream all events."""
        wanted = frozenset(filter or ())
        with self._machine.events() as events:
            yield {"event": READY}
            async for event in events:
                if not wanted or event.name in wanted:
                    yield {"event": event.name, "data": event.data}
        if events.is_overrun:
            raise EventsLost("events were lost, because the client read too slowly", hint="subscribe again")
        raise NotConnected("the machine ended")

    @varlinkmethod
    async def AddStorage(self, *, fileDescriptorIndex: FileDescriptor, name: str, config: str | None = None) -> None:
        """Attach a raw image or block device on the bus `config`. The disk is read-only if the descriptor is."""
        bus = check_bus(config or DEFAULT_BUS)
        backing = await _backing(fileDescriptorIndex, read_only=bus == "scsi-cd" or None)
        await self._machine.storage.attach(Disk("", name, bus, "raw", not backing.is_writable), backing)

    @varlinkmethod
    async def RemoveStorage(self, *, name: str) -> None:
        """Detach a disk. Replies when QEMU has removed the disk and closed its image.

        Replies with StoragePending after a timeout; the removal continues.
        """
        await self._machine.storage.detach(name)

    @varlinkmethod
    async def ReplaceStorage(self, *, fileDescriptorIndex: FileDescriptor, name: str) -> None:
        """Replace the image of a disk by a raw image or block device, while the guest uses the disk."""
        backing = await _backing(fileDescriptorIndex, read_only=_is_read_only(self._machine, name))
        await self._machine.storage.changes.replace(name, backing, format="raw")


class VirtualMachineInstance(VarlinkInterface, name="io.systemd.VirtualMachineInstance"):
    """An interface without methods, which marks the machine as a virtual one."""


class QemuMachineInstance(VarlinkInterface, name="io.systemd.QemuMachineInstance"):
    """Direct access to QEMU, for any number of clients.

    Only vmspawn serves this interface, because systemd removed its stub on 2026-04-24.
    """

    errors = (errors.AlreadyAcquired,)

    def __init__(self, machine: Running) -> None:
        self._machine = machine

    async def _upgrade(self) -> Taker:
        return await qmp.take_over(self._machine, read_only=False)

    @upgradable(_upgrade)
    @varlinkmethod
    async def AcquireQMP(self) -> qmp.Acquired:
        """Open a QMP session on a new descriptor or, with `upgrade`, on this connection."""
        return await qmp.acquire(self._machine, read_only=False)


class _Attached(typing.TypedDict):
    name: str
    bus: str
    format: str
    readOnly: bool
    serial: str
    byId: str
    place: str


@varlink_type
class Happening:
    """A recent event, with its time in microseconds since 1970."""

    realTimeUSec: int
    text: str


def _happening(entry: Entry) -> Happening:
    return Happening(int(entry.when * _MICROSECONDS), entry.text)


@varlink_type
class MissingCondition:
    """A condition that does not hold, and the reason if it is known."""

    condition: str
    why: str


class _MachineDescription(typing.TypedDict):
    name: str
    status: str
    responding: bool
    running: bool
    processId: int
    qemuVersion: str
    accelerator: str
    machineType: str
    ports: int
    portsFree: int
    uptimeUSec: int
    sessions: int
    recentEvents: list[Happening]
    lastError: Happening | None


class Machine(VarlinkInterface, name=errors.VMSPAWN):
    """The features of vmspawn's machines that systemd's interfaces do not have."""

    errors = errors.VMSPAWN_ERRORS

    def __init__(self, machine: Running, inside: Inside) -> None:
        self._machine = machine
        self._inside = inside

    @varlinkmethod
    async def Describe(self) -> _MachineDescription:
        """Describe the machine. If `responding` is false, the state is the last one that QEMU reported."""
        machine = self._machine
        responding = await machine.ask_status()
        if responding:
            await machine.storage.look_at_places()
        return {
            "name": machine.name,
            "status": machine.status,
            "responding": responding,
            "running": machine.is_running,
            "processId": machine.pid,
            "qemuVersion": machine.qemu_version,
            "accelerator": machine.accelerator,
            "machineType": machine.config.machine_type,
            "ports": machine.storage.ports,
            "portsFree": machine.storage.ports_free,
            "uptimeUSec": int(machine.uptime * _MICROSECONDS),
            "sessions": len(machine.sessions),
            "recentEvents": [_happening(each) for each in machine.recent_events.events],
            "lastError": _happening(error) if (error := machine.recent_events.last_error) else None,
        }

    @varlinkmethod
    async def ResizeConsole(self, *, rows: int, columns: int) -> None:
        """Pass the size of the console's window to the guest, if the console supports it."""
        for name, value in (("rows", rows), ("columns", columns)):
            if not 0 < value < 1 << 16:
                raise InvalidParameter(parameter=name)
        await self._machine.window.resize(rows, columns)

    @varlinkmethod(return_parameter="storage")
    async def ListStorage(self, *, statistics: bool | None = None, sizes: bool | None = None) -> list[Storage]:
        """Return all disks, including boot disks, with I/O totals since each was attached if `statistics` is true.

        If `sizes` is false, QEMU is not asked, and each size is 0. The default is true.
        """
        storage = self._machine.storage
        counted = await storage.statistics() if statistics else {}
        views = {} if sizes is False else await storage.views()
        return [
            describe(each, views.get(each.name, DiskView()), storage.why_pending(each), counted.get(each.name))
            for each in storage
        ]

    @varlinkmethod
    async def AttachStorage(
        self,
        *,
        name: str,
        fileDescriptorIndex: FileDescriptor | None = None,
        bus: str | None = None,
        format: str | None = None,
        readOnly: bool | None = None,
        serial: str | None = None,
        path: str | None = None,
        discard: str | None = None,
        detectZeroes: str | None = None,
        cache: str | None = None,
        aio: str | None = None,
        thread: bool | None = None,
        share: bool | None = None,
        bootIndex: int | None = None,
        onError: str | None = None,
        limits: StorageLimits | None = None,
        waitGuestUSec: int | None = None,
    ) -> _Attached:
        """Attach an image or block device. `bus` may be "auto". A scsi-cd without a descriptor is empty.

        The descriptor refers to the image; `path` is only shown to users. With `waitGuestUSec`, replies after the
        guest's first request to the disk, or with Timeout after that time, which leaves the disk attached.
        """
        if waitGuestUSec is not None and waitGuestUSec < 0:
            raise InvalidParameter(parameter="waitGuestUSec")
        guest_timeout = None if waitGuestUSec is None else waitGuestUSec / _MICROSECONDS
        chosen = bus or DEFAULT_BUS
        if chosen != AUTO_BUS:
            check_bus(chosen)
        wanted = with_options(
            Disk(path or "", name, chosen, format, bool(readOnly), serial or "", limits=to_limits(limits)),
            discard=discard,
            detect_zeroes=detectZeroes,
            cache=cache,
            aio=aio,
            thread=thread,
            share=share,
            boot_index=bootIndex,
            on_error=onError,
        )
        backing = None
        if fileDescriptorIndex is not None:
            read_only = is_only_read(chosen, format, read_only=bool(readOnly))
            backing = await _backing(fileDescriptorIndex, read_only=read_only or None)
        attached = await self._machine.storage.attach(wanted, backing, guest_timeout=guest_timeout)
        return {
            "name": attached.name,
            "bus": attached.disk.bus,
            "format": attached.format,
            "readOnly": attached.read_only,
            "serial": attached.serial,
            "byId": attached.by_id,
            "place": str(attached.place),
        }

    @varlinkmethod(return_parameter="pending")
    async def DetachStorage(self, *, name: str, timeoutUSec: int | None = None, force: bool | None = None) -> bool:
        """Detach a disk. Replies with StoragePending after `timeoutUSec` (default: 30 s); the removal continues.

        `force` closes the image first, so the guest gets I/O errors. `pending` is true if the guest still has the
        device.
        """
        if timeoutUSec is not None and timeoutUSec < 0:
            raise InvalidParameter(parameter="timeoutUSec")
        timeout = DETACH_TIMEOUT if timeoutUSec is None else timeoutUSec / _MICROSECONDS
        return not await self._machine.storage.detach(name, timeout=timeout, force=bool(force))

    @varlinkmethod(return_parameter="sizeBytes")
    async def ReplaceStorage(
        self,
        *,
        fileDescriptorIndex: FileDescriptor,
        name: str,
        format: str | None = None,
        path: str | None = None,
        shrink: bool | None = None,
    ) -> int:
        """Replace the image of a disk while the guest uses it."""
        read_only = _is_read_only(self._machine, name)
        backing = await _backing(fileDescriptorIndex, read_only=read_only)
        return await self._machine.storage.changes.replace(
            name, backing, format=format, path=path or "", shrink=bool(shrink)
        )

    @varlinkmethod(return_parameter="sizeBytes")
    async def ResizeStorage(self, *, name: str, sizeBytes: int | None = None, shrink: bool | None = None) -> int:
        """Resize a disk and its image. Without a size, resize the disk to the image's current size."""
        return await self._machine.storage.changes.resize(name, sizeBytes, shrink=bool(shrink))

    @varlinkmethod
    async def LimitStorage(self, *, name: str, limits: StorageLimits | None = None) -> None:
        """Change a disk's I/O limits. Without `limits`, remove them."""
        await self._machine.storage.changes.limit(name, to_limits(limits))

    @varlinkmethod
    async def InsertMedia(
        self,
        *,
        fileDescriptorIndex: FileDescriptor,
        name: str,
        format: str | None = None,
        path: str | None = None,
        force: bool | None = None,
        timeoutUSec: int | None = None,
    ) -> None:
        """Insert a medium into an optical drive, replacing the present one.

        A guest that has locked the tray has `timeoutUSec` (default: 10 s) to open it; after that, the reply is
        StoragePending.
        """
        timeout = _tray_timeout(timeoutUSec)
        backing = await _backing(fileDescriptorIndex, read_only=True)
        await self._machine.storage.changes.insert_media(
            name, backing, format=format, path=path or "", force=bool(force), timeout=timeout
        )

    @varlinkmethod
    async def EjectMedia(self, *, name: str, force: bool | None = None, timeoutUSec: int | None = None) -> None:
        """Eject the medium of an optical drive and leave the tray open. `timeoutUSec` is as in InsertMedia."""
        timeout = _tray_timeout(timeoutUSec)
        await self._machine.storage.changes.eject_media(name, force=bool(force), timeout=timeout)

    @varlinkmethod(allow_foreign=True)
    async def Snapshot(
        self, *, name: str | None = None, temporary: bool | None = None, detachBlocking: bool | None = None
    ) -> AsyncIterator[snapshot_types.Progress]:
        """Save the machine: RAM, devices and disks. Each reply has the progress, and the last one has the snapshot."""
        from . import snapshots

        async for progress in snapshots.make(
            self._machine, name or "", temporary=bool(temporary), detach_blocking=bool(detachBlocking)
        ):
            yield progress

    @varlinkmethod(return_parameter="machines")
    async def Fork(
        self,
        *,
        snapshot: str | None = None,
        names: list[str] | None = None,
        keepDisks: bool | None = None,
        newIdentity: bool | None = None,
        console: str | None = None,
        log: str | None = None,
        forwards: list[snapshot_types.WantedForward] | None = None,
        dieWithCaller: bool | None = None,
    ) -> list[str]:
        """Start copies of the machine from a snapshot, by default its only snapshot. Returns the copies' names.

        `keepDisks` keeps the copies' disks when they end. `newIdentity` gives their guests host names, machine IDs and
        MAC addresses of their own. `console` is headless, the default, or gui. `log` is the absolute path of the file
        that the console's output is appended to. `forwards` are the copies' forwards; those of the source are not
        copied. `dieWithCaller` ends the copies when the process that has connected to this socket dies.
        """
        from . import snapshots

        options = snapshots.to_options(
            keep_disks=keepDisks,
            new_identity=newIdentity,
            console=console,
            log=log,
            forwards=forwards,
            die_with_caller=dieWithCaller,
        )
        return await snapshots.fork(self._machine, snapshot or "", names or [], options)

    @varlinkmethod(return_parameter="snapshots")
    async def ListSnapshots(self) -> list[snapshot_types.ListedSnapshot]:
        """Return the machine's snapshots, the oldest first."""
        from . import snapshots

        return await snapshots.list_all(self._machine)

    @varlinkmethod
    async def RemoveSnapshot(self, *, name: str) -> None:
        """Remove a snapshot of the machine."""
        from . import snapshots

        await snapshots.remove(self._machine, name)

    async def _upgrade(self, *, readOnly: bool | None = None) -> Taker:
        return await qmp.take_over(self._machine, read_only=bool(readOnly))

    @upgradable(_upgrade)
    @varlinkmethod
    async def AcquireQMP(self, *, readOnly: bool | None = None) -> qmp.Acquired:
        """Open a QMP session on a new descriptor or, with `upgrade`, on this connection. `readOnly` refuses changes."""
        return await qmp.acquire(self._machine, read_only=bool(readOnly))

    @varlinkmethod(return_parameter="sessions")
    def ListSessions(self) -> list[qmp.Session]:
        """Return the connected QMP clients, the oldest first."""
        return [qmp.describe(each) for each in self._machine.sessions]

    @varlinkmethod(return_parameter="forward")
    async def AddForward(
        self, *, guestPort: int, port: int | None = None, address: str | None = None, protocol: str | None = None
    ) -> PortForward:
        """Forward a port of the host to a port of the guest. The default is a free TCP port of 127.0.0.1."""
        return PortForward.of(await self._machine.forwards.add(to_forward(guestPort, port, address, protocol)))

    @varlinkmethod(return_parameter="forward")
    async def RemoveForward(
        self, *, port: int, guestPort: int | None = None, address: str | None = None, protocol: str | None = None
    ) -> PortForward:
        """Remove a forward. Its open connections stay."""
        wanted = to_forward(guestPort or 1, port, address, protocol)._replace(guest_port=guestPort or 0)
        return PortForward.of(await self._machine.forwards.remove(wanted))

    @varlinkmethod(return_parameter="forwards")
    async def ListForwards(self) -> list[PortForward]:
        """Return the forwards of the machine."""
        return [PortForward.of(each) for each in await self._machine.forwards.list()]

    @varlinkmethod(return_parameter="missing")
    async def Wait(self, *, conditions: list[str], timeoutUSec: int) -> list[MissingCondition]:
        """Wait until all conditions hold: agent, booted, disk=NAME, port=N, ssh.

        Returns the conditions that do not hold after `timeoutUSec`.
        """
        from ..inside.waiting import wait_for

        try:
            wanted = [parse(each) for each in conditions]
        except UsageError:
            raise InvalidParameter(parameter="conditions") from None
        if any(each.kind in OF_CLIENT for each in wanted):
            raise InvalidParameter(parameter="conditions")
        missing = await wait_for(self._machine, self._inside, wanted, timeoutUSec / _MICROSECONDS)
        return [MissingCondition(each.condition, each.why) for each in missing]

    @varlinkmethod(delay_generator=False)
    async def Execute(
        self,
        *,
        arguments: list[str] | None = None,
        environment: list[str] | None = None,
        directory: str | None = None,
        user: str | None = None,
        stdin: bool | None = None,
        rows: int | None = None,
        columns: int | None = None,
        base64: bool | None = None,
        timeoutUSec: int | None = None,
    ) -> AsyncIterator[Progress]:
        """Run a command in the guest, or the user's login shell, and pass its streams to the client.

        With `rows` and `columns`, the command has a terminal. `environment` is a list of NAME=VALUE. If `base64` is
        true, all strings are base64-encoded. The end of the connection ends the command.
        """
        from . import execute

        command = execute.wanted(
            arguments or [],
            environment=environment or [],
            directory=directory,
            user=user,
            stdin=stdin is not False,
            rows=rows,
            columns=columns,
            encoded=bool(base64),
        )
        timeout = COMMAND_START_TIMEOUT if timeoutUSec is None else timeoutUSec / _MICROSECONDS
        async for progress in execute.execute(self._inside.commands, command, timeout):
            yield progress

    @varlinkmethod
    def ResizeTerminal(self, *, id: str, rows: int, columns: int) -> None:
        """Set the size of a command's terminal."""
        for name, value in (("rows", rows), ("columns", columns)):
            if not 0 <= value < 1 << 16:
                raise InvalidParameter(parameter=name)
        self._inside.commands.resize(id, rows, columns)

    @varlinkmethod
    def SignalCommand(self, *, id: str, signal: int) -> None:
        """Send a signal to a command's process group."""
        self._inside.commands.signal(id, signal)
