# SPDX-License-Identifier: LGPL-2.1-or-later
"""Connects to a machine that another process manages."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, ExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Literal, Unpack

from ..control import calls
from ..control.client import REPLY_TIMEOUT
from ..errors import NotConnected, NotSupported, VmspawnError
from ..host import runtime
from ..inside.commands import Wanted
from ..inside.conditions import Condition, Missing
from ..machine import run_states
from ..machine.ending import MACHINE_ENDED, End
from ..machine.run_states import Verb
from ..network.forward import Forward
from ..qmp.events import Event
from ..qmp.monitor import Monitor
from ..storage.disk import Disk, is_only_read, with_defaults
from ..storage.limits import NO_LIMITS, Limits
from ..timeouts import DETACH_TIMEOUT, DRIVER_TIMEOUT, REPLY_GRACE, TRAY_TIMEOUT
from .attached_disk import AttachedDisk, DiskStatus
from .commands import Guest
from .connected_console import ConnectedConsole
from .console import Console
from .control import Qmp
from .events import Events, Record
from .execution import Remote
from .images import open_image
from .machine import Machine, Snapshot, copy_of
from .options import CopyOptions, DiskOptions, Size, StrPath, to_disk, to_forward, to_size
from .remotes import Connected

_INSTANCE = "io.systemd.MachineInstance"
_MACHINE = "io.vmspawn.Machine"

_MICROSECONDS = 1_000_000


@asynccontextmanager
async def connect(name: str) -> AsyncIterator[ConnectedMachine]:
    """Connect to a running machine by its name: `async with vmspawn.connect("demo") as machine:`.

    The machine continues after the `async with` statement. Raises NotConnected if no machine has the name, or the
    machine has no manager.
    """
    machine = ConnectedMachine(name)
    async with machine._subscribed([]) as events:
        recording = asyncio.create_task(machine._record_events(events))
        try:
            yield machine
        finally:
            recording.cancel()
            await asyncio.wait({recording})
            machine._record.end()
            machine._closing.close()


class ConnectedMachine(Guest):
    """A machine that another process manages. `connect` makes one.

        async with vmspawn.connect("demo") as machine:
            await machine.attach("data.raw")

    Sizes are in bytes, times in seconds. Images are opened by your program, with its permissions.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._record = Record(name)
        self._console: ConnectedConsole | None = None
        self._closing = ExitStack()

    def __repr__(self) -> str:
        return f"<ConnectedMachine {self._name!r}>"

    async def _record_events(self, events: AsyncIterator[Event]) -> None:
        # No caller awaits this task. A stream from `machine.events()` raises its own errors, such as EventsLost.
        with suppress(VmspawnError):
            async for event in events:
                self._record.put(event)
        self._record.end()

    async def _call(
        self,
        method: str,
        parameters: Mapping[str, object] | None = None,
        *,
        path: StrPath | None = None,
        read_only: bool = False,
        timeout: float = REPLY_TIMEOUT,
    ) -> dict[str, Any]:
        """Call a method, and pass the image at `path` to it unless `path` is None."""
        if path is None:
            return (await calls.call(self._name, method, parameters, timeout=timeout)).parameters
        backing = await open_image(os.fspath(path), read_only=read_only)
        image = {"fileDescriptorIndex": 0, "path": _absolute(path), **(parameters or {})}
        try:
            return (await calls.call(self._name, method, image, fds=(backing.fd,), timeout=timeout)).parameters
        finally:
            backing.close()

    # Properties.

    @property
    def name(self) -> str:
        """The machine's name."""
        return self._name

    @property
    def directory(self) -> Path:
        """The machine's runtime directory, with its sockets and QEMU's log."""
        return Path(runtime.runtime_root(), self._name)

    async def status(self) -> str:
        """Return QEMU's run state, such as `running` or `paused`."""
        return str((await self._call(f"{_INSTANCE}.Describe"))["status"])

    # Life cycle.

    async def _change(self, verb: Verb, method: str) -> None:
        try:
            await self._call(f"{_INSTANCE}.{method}")
        except NotSupported:
            # systemd's interface carries no reason.
            raise run_states.refusal(verb, await self.status()) from None

    async def power_off(self) -> None:
        """Press the power button (ACPI). `wait` returns after the guest has powered off.

        Raises NotSupported if the guest's state does not let it notice the button.
        """
        await self._change("poweroff", "PowerOff")

    async def reboot(self) -> None:
        """Press the reset button. A paused guest stays paused; any other guest runs afterwards."""
        await self._change("reboot", "Reboot")

    async def pause(self) -> None:
        """Stop the guest's processors."""
        await self._change("pause", "Pause")

    async def resume(self) -> None:
        """Continue the guest's processors, or wake a suspended guest up. Raises NotSupported if the guest is off."""
        await self._change("resume", "Resume")

    async def terminate(self) -> None:
        """End the machine without asking the guest. Returns when QEMU accepts `quit`; a QEMU that hangs is killed."""
        await self._call(f"{_INSTANCE}.Terminate")

    async def wait(self) -> End:
        """Wait until the machine has ended, and return the reason.

        Raises NotConnected if the manager ends first; the machine may then continue without one.
        """
        async with self._subscribed([MACHINE_ENDED]) as events:
            async for event in events:
                data = event.data or {}
                return End(str(data["reason"]), str(data["message"]), bool(data["clean"]))
        raise NotConnected(f"the manager of machine {self._name} has ended")

    async def _wait_by_manager(self, conditions: Sequence[Condition], timeout: float) -> list[Missing]:
        wanted = {"conditions": list(map(str, conditions)), "timeoutUSec": int(timeout * _MICROSECONDS)}
        reply = await self._call(f"{_MACHINE}.Wait", wanted, timeout=timeout + REPLY_GRACE)
        return [Missing(each["condition"], each["why"]) for each in reply["missing"]]

    @property
    def events(self) -> Events[AbstractAsyncContextManager[AsyncIterator[Event]]]:
        """The machine's events since `connect`: `await machine.events.wait("RESET")`."""
        return Events(self._record, self._subscribed)

    @property
    def console(self) -> Console:
        """The guest's console: `await machine.console.expect("login: ")`.

        Reading begins with the first use of this property, with the last 64 KiB of output. From then on, a program that
        blocks its event loop slows the guest down. Raises NotSupported if the machine shares no console.
        """
        if self._console is None:
            self._console = ConnectedConsole(self._name)
            self._closing.callback(self._console.close)
        return self._console

    @asynccontextmanager
    async def _subscribed(self, names: Sequence[str] = ()) -> AsyncIterator[AsyncIterator[Event]]:
        async with calls.opened(self._name) as connection:
            message = {"method": f"{_INSTANCE}.SubscribeEvents", "parameters": {"filter": list(names)}, "more": True}
            await connection.send(message)
            # The first reply reports that the subscription is complete.
            await calls.in_time(connection.receive(), self._name, "SubscribeEvents", REPLY_TIMEOUT)
            yield _events(connection)

    @asynccontextmanager
    async def qmp(self, *, read_only: bool = False) -> AsyncIterator[Qmp]:
        """Open a QMP connection: `async with machine.qmp() as qmp: await qmp.execute("query-block")`."""
        reply = await calls.call(self._name, f"{_MACHINE}.AcquireQMP", {"readOnly": read_only})
        client = Monitor(socket.socket(fileno=reply.fds[0]))
        try:
            await client.greeting()
            yield client
        finally:
            client.close()

    async def _start_command(self, wanted: Wanted, timeout: float) -> Remote:
        return await Connected.start(self._name, wanted, timeout)

    # Network.

    async def forward(self, forward: Forward | str | int) -> Forward:
        """Forward a port of the host to the guest, and return a `Forward` with the host's port.

        A string has the syntax of the command line: `[ADDRESS:]PORT:GUESTPORT[/udp]`. A number is the guest's port; a
        free port of 127.0.0.1 is forwarded to it. Raises PortInUse, UsageError, NotSupported or SystemFailure.
        """
        return _forward((await self._call(f"{_MACHINE}.AddForward", _parameters(to_forward(forward))))["forward"])

    async def remove_forward(self, forward: Forward | str) -> Forward:
        """Remove a forward, and return it. Its open connections stay. Raises NoSuchForward."""
        wanted = _parameters(to_forward(forward))
        return _forward((await self._call(f"{_MACHINE}.RemoveForward", wanted))["forward"])

    async def forwards(self) -> list[Forward]:
        """Return the forwards of the machine."""
        return [_forward(each) for each in (await self._call(f"{_MACHINE}.ListForwards"))["forwards"]]

    # Snapshots.

    async def snapshot(self, name: str = "") -> Snapshot:
        """Save the machine while it runs: RAM, devices and disks. Raises what `Machine.snapshot` raises."""
        found = await self._save(name=name)
        return Snapshot(found["snapshot"], found["pauseUSec"] / _MICROSECONDS, found["sizeBytes"])

    async def _save(self, **parameters: object) -> dict[str, Any]:
        async with calls.opened(self._name) as connection:
            await connection.send({"method": f"{_MACHINE}.Snapshot", "parameters": parameters, "more": True})
            found: dict[str, Any] = {}
            while "snapshot" not in found:
                found = (await connection.receive()).parameters
        return found

    def fork(
        self,
        name: str | None = None,
        *,
        keep_disks: bool = False,
        identity: Literal["same", "new"] = "same",
        **options: Unpack[CopyOptions],
    ) -> Machine:
        """Return a copy, as `Machine.fork` does. This program manages the copy."""

        async def save_temporarily() -> str:
            return str((await self._save(temporary=True))["snapshot"])

        return copy_of(self.name, save_temporarily, name, keep_disks, identity, options)

    # Disks.

    async def disks(self) -> list[DiskStatus]:
        """Return all disks, including boot disks."""
        found = await self._call(f"{_MACHINE}.ListStorage")
        return [_disk_status(each) for each in found["storage"]]

    async def attach(
        self,
        disk: Disk | StrPath,
        *,
        wait_guest: bool = False,
        timeout: float = DRIVER_TIMEOUT,
        **options: Unpack[DiskOptions],
    ) -> AttachedDisk:
        """Attach a disk: `await machine.attach("data.qcow2", format="qcow2", bus="virtio-scsi")`.

        The keyword arguments are the fields of Disk. A scsi-cd with the path "" is empty. Returns when QEMU has plugged
        in the device.

        With `wait_guest`, returns after the guest's first request to the disk, which Linux makes when it creates the
        disk's node in /dev. Raises Timeout after `timeout` seconds; the disk stays attached.

        Also raises StorageExists, BadConfig, ConfigNotSupported, NoFreePort, QmpError, SystemFailure, or Timeout if
        QEMU does not answer; the attach is undone then, in the background if that takes long.
        """
        disk = to_disk(disk, options)
        named = with_defaults(disk)
        wanted = {
            "name": named.name,
            "bus": named.bus,
            "format": named.format,
            "readOnly": named.read_only,
            "serial": named.serial or None,
            "discard": named.discard,
            "detectZeroes": named.detect_zeroes,
            "cache": named.cache,
            "aio": named.aio,
            "thread": named.thread,
            "share": named.share,
            "bootIndex": named.boot_index,
            "onError": named.on_error or None,
            "limits": _limits(named.limits),
            "waitGuestUSec": int(timeout * _MICROSECONDS) if wait_guest else None,
        }
        read_only = is_only_read(disk.bus, disk.format, read_only=disk.read_only)
        path = named.path or None
        return _attached(
            await self._call(
                f"{_MACHINE}.AttachStorage",
                wanted,
                path=path,
                read_only=read_only,
                timeout=REPLY_TIMEOUT + (timeout if wait_guest else 0.0),
            )
        )

    async def detach(self, name: str, *, timeout: float = DETACH_TIMEOUT, force: bool = False) -> bool:
        """Detach a disk. Returns True when all of it is removed.

        Raises StoragePending if the guest has not released the disk after `timeout` seconds; the removal continues.
        Also raises NoSuchStorage or StorageImmutable.

        `force` takes the image away first, so the guest gets I/O errors. The result is then False if the guest has not
        released the device yet.
        """
        wanted = {"name": name, "timeoutUSec": int(timeout * _MICROSECONDS), "force": force}
        reply = await self._call(f"{_MACHINE}.DetachStorage", wanted, timeout=timeout + REPLY_GRACE)
        return not reply["pending"]

    async def replace(self, name: str, path: StrPath, *, format: str | None = None, shrink: bool = False) -> int:
        """Replace the image of a disk while the guest uses it, and return the new size in bytes.

        Raises the errors of `attach`, NoSuchStorage or StorageImmutable; the disk then keeps its image.
        """
        read_only = any(each.disk.name == name and each.disk.read_only for each in await self.disks())
        wanted = {"name": name, "format": format, "shrink": shrink}
        reply = await self._call(f"{_MACHINE}.ReplaceStorage", wanted, path=path, read_only=read_only)
        return int(reply["sizeBytes"])

    async def resize(self, name: str, size: Size | None = None, *, shrink: bool = False) -> int:
        """Resize a disk and its image, to a number of bytes or a text such as "2G". Returns the size in bytes.

        Without a size, resizes the disk to the image's current size. Raises NoSuchStorage, BadConfig,
        ConfigNotSupported, UsageError or QmpError.
        """
        size = None if size is None else to_size("size", size)
        wanted = {"name": name, "sizeBytes": size, "shrink": shrink}
        return int((await self._call(f"{_MACHINE}.ResizeStorage", wanted))["sizeBytes"])

    async def limit(self, name: str, limits: Limits) -> None:
        """Change a disk's I/O limits. `Limits()` removes them. Raises NoSuchStorage, BadConfig or QmpError."""
        await self._call(f"{_MACHINE}.LimitStorage", {"name": name, "limits": _limits(limits)})

    async def insert_media(
        self, name: str, path: StrPath, *, format: str | None = None, force: bool = False, timeout: float = TRAY_TIMEOUT
    ) -> None:
        """Insert an image into an optical drive.

        Raises StoragePending if the guest keeps the tray locked for `timeout` seconds; `force` opens a locked tray.
        Also raises NoSuchStorage, BadConfig or QmpError.
        """
        wanted = {"name": name, "format": format, "force": force, "timeoutUSec": int(timeout * _MICROSECONDS)}
        await self._call(f"{_MACHINE}.InsertMedia", wanted, path=path, read_only=True, timeout=timeout + REPLY_TIMEOUT)

    async def eject_media(self, name: str, *, force: bool = False, timeout: float = TRAY_TIMEOUT) -> None:
        """Eject the medium of an optical drive. Raises the errors of `insert_media`."""
        wanted = {"name": name, "force": force, "timeoutUSec": int(timeout * _MICROSECONDS)}
        await self._call(f"{_MACHINE}.EjectMedia", wanted, timeout=timeout + REPLY_TIMEOUT)


async def _events(connection: calls.Connection) -> AsyncIterator[Event]:
    """Yield the events of a subscription until the machine has ended."""
    while True:
        try:
            reply = (await connection.receive()).parameters
        except NotConnected:
            return
        yield Event(reply["event"], reply.get("data"))


def _absolute(path: StrPath) -> str:
    return os.path.abspath(path)


# The names in camelCase are those of the Varlink interface.


def _parameters(forward: Forward) -> dict[str, object]:
    return {
        "address": forward.address,
        "port": forward.port,
        "guestPort": forward.guest_port,
        "protocol": forward.protocol,
    }


def _forward(found: Mapping[str, Any]) -> Forward:
    return Forward(found["guestPort"], found["port"], found["address"], found["protocol"])


def _attached(found: Mapping[str, Any]) -> AttachedDisk:
    return AttachedDisk(
        found["name"],
        found["bus"],
        found["format"],
        found["readOnly"],
        found["serial"],
        found["byId"],
        found["place"],
    )


def _disk_status(found: Mapping[str, Any]) -> DiskStatus:
    limits = found["limits"]
    return DiskStatus(
        _attached(found),
        found["sizeBytes"],
        found["state"],
        found["boot"],
        found["path"],
        NO_LIMITS if limits is None else _from_limits(limits),
        found["failures"],
        found["lastFailure"],
        found["notice"],
        found["device"],
        found["node"],
        tuple(found.get("backingFiles", ())),
    )


_LIMITS = ("iops", "iopsRead", "iopsWrite", "bps", "bpsRead", "bpsWrite")


def _limits(limits: Limits) -> dict[str, int] | None:
    if not limits.has_any:
        return None
    return {**dict(zip(_LIMITS, limits[:6], strict=True)), "burstPercent": round(limits.burst * 100)}


def _from_limits(found: Mapping[str, int]) -> Limits:
    return Limits(*(found[name] for name in _LIMITS))._replace(burst=found["burstPercent"] / 100)
