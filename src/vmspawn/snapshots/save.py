# SPDX-License-Identifier: LGPL-2.1-or-later
"""Saves a running machine: RAM, devices and disks.

1. Disk changes, and commands of QMP sessions and of the manager itself, are held back.
2. Devices and disks that cannot be saved are found; if there are any, the save fails.
3. While the guest runs, the overlays are opened, and space on the disk is reserved.
4. The guest is stopped, and QEMU writes its state.
5. The overlays are inserted, all or none, and the images below become read-only.
6. The guest continues, and the snapshot gets its name.

A failure before step 5 leaves nothing behind. After a later failure, the disks continue to use the overlays. A
cancellation is a failure too. It waits for the end of commands to QEMU, whose effect would be unknown otherwise.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, TypeVar

from ..aio.cancellation import Cancellation
from ..aio.threads import run_cancellable
from ..boot import incoming
from ..boot.incoming import Recorded
from ..errors import QmpError, SnapshotBlocked, SnapshotExists, SystemFailure, VmspawnError
from ..hotplug.attachment import State as AttachmentState
from ..hotplug.qemu_objects import device_ids
from ..images import snapshot_files
from ..machine.running import Running
from ..qmp.monitor import Command
from ..storage.freeze import Frozen, Wanted
from ..storage.image import Image
from . import blockers, same_host, stream
from .blockers import Blocker
from .describing import Prepared, describe, name_of_process, sizes_of
from .detaching import detach_blocking as detach_disks
from .directory import CURRENT, NewFolder, check_name
from .kept_files import STATE_FILE, KeptFiles
from .manifest import Manifest, State
from .newest import NewestDisks

_T = TypeVar("_T")

#: Seconds within which disk changes and commands of sessions must end.
_HOLD_TIMEOUT = 15.0


class Saved(NamedTuple):
    """A snapshot that was made. `pause` is the number of seconds that the guest was paused."""

    manifest: Manifest
    pause: float
    #: For each disk: its name, the path of the image, which no longer changes, and the path of the overlay, which is ""
    #: if the overlay has no name.
    disks: list[tuple[str, str, str]]


Progress = Callable[[int, int], None]


async def save(
    machine: Running,
    name: str = "",
    *,
    is_temporary: bool = False,
    detach_blocking: bool = False,
    parent: str = "",
    on_progress: Progress = lambda _done, _total: None,
) -> Saved:
    """Save a machine. `on_progress` is called with the number of written bytes of RAM, and with the total.

    `detach_blocking` detaches disks that cannot be saved, and attaches them again afterwards. `parent` is the directory
    in which the snapshot's directory is made; the default is that of all snapshots.

    Raises SnapshotBlocked, SnapshotExists, UsageError, SystemFailure, QmpError, Timeout or NotConnected. The machine
    then continues, and nothing of the snapshot is left. The same is true after a cancellation.
    """
    name = check_name(name) if name else await asyncio.to_thread(_free_name, machine.name)
    if name == CURRENT:
        raise SnapshotExists(f"{machine.name}@{CURRENT} names the machine's newest disks", hint="use another name")
    cancellation = Cancellation()
    begin = partial(_Save, machine, name, is_temporary, on_progress, parent, cancellation)
    return await cancellation.run(_save(machine, begin, cancellation, detach_blocking=detach_blocking))


async def _save(
    machine: Running, begin: Callable[[], _Save], cancellation: Cancellation, *, detach_blocking: bool
) -> Saved:
    async with contextlib.AsyncExitStack() as afterwards:
        if detach_blocking:
            recorded = await _record(machine)
            with cancellation.allowed():
                await detach_disks(machine, recorded.options, afterwards)
        with cancellation.allowed():
            await afterwards.enter_async_context(machine.held(timeout=_HOLD_TIMEOUT))
        return await begin().run()


async def _record(machine: Running) -> Recorded:
    """Record the machine's command line."""
    kind = str(await machine.monitor.execute("qom-get", {"path": "/machine", "property": "type"}))
    return incoming.record(_arguments(machine.pid), kind.removesuffix("-machine"))


def _free_name(machine: str) -> str:
    """Return the first number that no snapshot of the machine has."""
    taken = set(snapshot_files.names())
    return next(str(n) for n in range(1, len(taken) + 2) if f"{machine}@{n}" not in taken)


class _Save:
    """One save of a machine. The caller holds back all other users of QEMU (`Running.held`)."""

    def __init__(
        self,
        machine: Running,
        name: str,
        is_temporary: bool,
        on_progress: Progress,
        parent: str,
        cancellation: Cancellation,
    ) -> None:
        self._machine = machine
        self._name = name
        self._is_temporary = is_temporary
        self._on_progress = on_progress
        self._cancellation = cancellation
        self._folder = NewFolder(f"{machine.name}@{name}", parent)
        self._files = KeptFiles(machine.pid, self._folder)
        # The disks of a copy outlive the copy only with `keep_disks`.
        is_lasting = machine.fork is None or machine.fork.keep_disks
        self._newest = NewestDisks(machine.name, self._files, is_lasting=is_lasting)
        self._freeze = machine.storage.freeze()
        self._was_running = machine.is_running

    async def run(self) -> Saved:
        """Save the machine. Raises the errors of `save`."""
        recorded = await _record(self._machine)
        found = await blockers.find(self._machine, recorded.options)
        if found:
            raise _blocked(self._machine.name, found)
        self._journal(self._folder.path)
        try:
            return await self._run(recorded)
        except BaseException as error:
            await self._freeze.undo()
            await asyncio.to_thread(self._tidy)
            if isinstance(error, OSError):
                raise SystemFailure("cannot write the snapshot", error.errno or errno.EIO) from None
            raise
        finally:
            self._files.close()
            self._journal(None)

    async def _run(self, recorded: Recorded) -> Saved:
        state, prepared = await self._prepare(recorded)
        begun = time.monotonic()
        try:
            manifest = await self._stop_and_save(prepared, state)
            await self._insert_overlays(manifest)
        finally:
            await self._go_on()
            pause = time.monotonic() - begun
        await self._in_thread(partial(self._finish, manifest, state))
        await self._freeze.finish()
        # A cancellation that arrived since the pause still removes the snapshot.
        self._cancellation.check()
        disks = [(each.disk.name, each.base.path, each.overlay.path) for each in self._freeze.frozen]
        return Saved(manifest, pause, disks)

    async def _in_thread(self, call: Callable[[], _T]) -> _T:
        """Call a function in a thread. Raises its errors. A cancellation waits for the function's end."""
        with self._cancellation.allowed():
            return await run_cancellable(call)

    # Before the pause.

    async def _prepare(self, recorded: Recorded) -> tuple[int, Prepared]:
        """Make the snapshot's directory and the overlays. Returns the state's descriptor, and facts for `describe`."""
        machine, files = self._machine, self._files
        disks = [each for each in machine.storage if each.state is AttachmentState.ATTACHED]
        size = min(_resident(machine.pid), machine.config.ram_bytes)
        await self._in_thread(self._folder.make)
        state = await self._in_thread(partial(files.reserve_state, machine.name, size))
        sets = {each["fdset-id"]: each["fds"] for each in await machine.monitor.execute("query-fdsets")}
        files.find_descriptors(recorded, sets)
        images = [image for disk in disks for top in disk.images for image in top.chain]
        await self._in_thread(partial(files.list_images, images))
        if self._freeze.candidates:
            process, is_copy = name_of_process(machine.pid), machine.fork is not None
            await self._in_thread(partial(self._newest.open_previous, images, process, is_copy=is_copy))
        # A manager that was killed, and whose QEMU ended, may have left overlays.
        await self._in_thread(self._tidy_newest)
        await self._freeze.prepare(self._make_overlays, self._open_read_only)
        descriptors = await self._in_thread(partial(files.list_descriptors, recorded))
        firmware = await self._in_thread(partial(files.firmware, recorded))
        processor = await self._in_thread(partial(same_host.processor, machine.accelerator))
        recorded = await self._in_thread(partial(files.keep_boot_files, recorded))
        devices = await device_ids(machine.monitor)
        return state, Prepared(recorded, descriptors, firmware, processor, devices, disks)

    async def _make_overlays(self, wanted: Sequence[Wanted]) -> Sequence[Image]:
        with self._cancellation.allowed():
            return await run_cancellable(
                partial(self._newest.make_overlays, wanted), undo=self._newest.discard_overlays
            )

    async def _open_read_only(self, frozen: Sequence[Frozen]) -> Sequence[int]:
        def close(found: Sequence[int]) -> None:
            for fd in found:
                os.close(fd)

        with self._cancellation.allowed():
            return await run_cancellable(partial(self._newest.open_read_only, frozen), undo=close)

    # The pause.

    async def _stop_and_save(self, prepared: Prepared, state: int) -> Manifest:
        """Stop the guest, and write its state to a file; returns the manifest."""
        machine = self._machine
        has_ram_file = incoming.ram_file(prepared.recorded.options) >= 0
        await machine.monitor.execute("stop")
        with self._cancellation.allowed():
            scheme = await stream.save(machine.monitor, state, self._on_progress, has_ram_file=has_ram_file)
        await self._in_thread(partial(self._files.copy_written, prepared.recorded, state))
        return describe(
            machine,
            self._name,
            prepared,
            self._files,
            self._freeze.frozen,
            await sizes_of(machine),
            State(STATE_FILE, os.fstat(state).st_size, scheme, self._files.memory_size()),
            is_temporary=self._is_temporary,
            was_running=self._was_running,
        )

    async def _insert_overlays(self, manifest: Manifest) -> None:
        """Insert the overlays. From then on MACHINE@current has the newest disks, even if a later step fails."""
        frozen = self._freeze.frozen
        await self._in_thread(partial(self._newest.write, manifest, self._folder.path, frozen))
        try:
            await self._freeze.switch()
        finally:
            if self._freeze.is_switched:
                self._newest.publish()

    async def _go_on(self) -> None:
        """Return the guest to its state before the save. A paused guest runs for a moment."""
        monitor = self._machine.monitor
        with contextlib.suppress(VmspawnError):
            await stream.forget(monitor)
        # QEMU 7.2 closes removed descriptors only while the guest runs.
        commands = [Command("cont"), stream.REMOVE_FDSET] + ([] if self._was_running else [Command("stop")])
        for command, result in zip(commands, await monitor.execute_all(commands), strict=True):
            if isinstance(result, QmpError) and command is not stream.REMOVE_FDSET:
                raise result

    # After the pause.

    def _finish(self, manifest: Manifest, state: int) -> None:
        """Write the manifests, and give the snapshot its name. Raises SnapshotExists, OSError."""
        # Closing an image may have changed it.
        manifest = manifest._replace(files=self._files.described())
        self._newest.write(manifest, self._folder.path, self._freeze.frozen)
        self._newest.publish()
        if not self._is_temporary:
            os.fsync(state)
            self._files.sync_memory()
        self._folder.write(snapshot_files.MANIFEST, manifest.to_json())
        self._folder.finish()

    def _tidy(self) -> None:
        """Remove the snapshot, and overlays that no disk uses."""
        self._folder.discard()
        self._tidy_newest()

    def _tidy_newest(self) -> None:
        """Remove overlays that neither a disk nor a snapshot uses from the directory of MACHINE@current."""
        used = {image.path for disk in self._machine.storage for image in disk.images}
        snapshot_files.tidy_current(self._machine.name, used)

    def _journal(self, folder: str | None) -> None:
        """Record the save for a later manager, with the guest's state before the save; with None, remove the record."""
        text = json.dumps(folder and {"folder": folder, "was_running": self._was_running})
        self._machine.journal.add_section("saving", lambda: text)
        self._machine.journal.write()


def _blocked(machine: str, found: list[Blocker]) -> SnapshotBlocked:
    reasons = "; ".join(each.reason for each in found)
    return SnapshotBlocked(f"cannot save {machine}: {reasons}", hint=found[0].hint)


def _arguments(pid: int) -> list[str]:
    """Return the command line of a process."""
    with open(f"/proc/{pid}/cmdline", "rb") as file:
        return [os.fsdecode(each) for each in file.read().split(b"\0")[:-1]]


def _resident(pid: int) -> int:
    """Return the number of bytes of memory that a process has touched, mapped files included."""
    with open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
