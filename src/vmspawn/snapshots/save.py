# SPDX-License-Identifier: LGPL-2.1-or-later
"""Saves a running machine: RAM, devices and disks.

1. Devices and disks that cannot be saved are found; if there are any, the save fails.
2. Disk changes, QMP sessions and the manager itself are kept from QEMU.
3. While the guest runs, the overlays are opened, and room on the disk is reserved.
4. The guest is stopped, and QEMU writes its state.
5. The overlays are put in, all or none, and the images below become read-only.
6. The guest goes on, and the snapshot gets its name.

A failure before step 5 leaves nothing behind. A failure after it leaves the overlays, which work.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from ..boot import incoming
from ..boot.incoming import Option, Recorded
from ..boot.overlay import empty_overlay
from ..boot.state import CONFIG_FIELDS
from ..errors import QmpError, SnapshotBlocked, SnapshotExists, SystemFailure, VmspawnError
from ..hotplug.attachment import State as AttachmentState
from ..hotplug.qemu_objects import device_ids
from ..images import snapshot_files
from ..machine.running import Running
from ..qmp.monitor import Command
from ..storage.attached_disk import AttachedDisk
from ..storage.backing import Backing, inspect_descriptor, set_direct
from ..storage.disk import Disk
from ..storage.freeze import Freeze
from ..storage.image import Image
from ..storage.saved import save_disk
from . import blockers, stream
from .blockers import Blocker
from .directory import CURRENT, NewFolder, check_name, path_of
from .manifest import Manifest, SnapshotFile, Source, State
from .open_files import OpenFiles, copy, give_name, keep, path_of_descriptor

#: Seconds that disk changes and commands of sessions which are under way have to end.
_HOLD_TIMEOUT = 15.0

#: Bytes of devices' state, and of what the headers of overlays take.
_DEVICES_SIZE = 16 << 20

_STATE_FILE = "state"


class Saved(NamedTuple):
    """A snapshot that was made. `pause` is the number of seconds that the guest stood still."""

    manifest: Manifest
    pause: float
    #: Each disk's name, the image that stays as it is, and the overlay; an overlay without a name is "".
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

    `detach_blocking` detaches disks that cannot be saved, and attaches them again afterwards. `parent` is the folder of
    all snapshots by default.

    Raises SnapshotBlocked, SnapshotExists, UsageError, SystemFailure, QmpError, Timeout or NotConnected; the machine
    runs on then, and nothing of the snapshot is left.
    """
    name = check_name(name) if name else _free_name(machine.name)
    if name == CURRENT:
        raise SnapshotExists(f"{machine.name}@{CURRENT} stands for the machine's newest disks", hint="use another name")
    async with contextlib.AsyncExitStack() as afterwards:
        if detach_blocking:
            await _detach_blocking(machine, afterwards)
        async with machine.held(timeout=_HOLD_TIMEOUT):
            return await _Save(machine, name, is_temporary, on_progress, parent).run()


async def _detach_blocking(machine: Running, afterwards: contextlib.AsyncExitStack) -> None:
    """Detach the disks that cannot be saved; `afterwards` attaches them again. Raises what `Storage.detach` raises."""
    recorded = await _record(machine)
    blocking = {each.disk for each in await blockers.find(machine, recorded.options) if each.disk}
    files = OpenFiles(machine.pid)
    for disk in [each for each in machine.storage if each.name in blocking]:
        image = disk.image
        if image is None or image.backing is None or image.base is not None:
            continue
        fd = files.open(image.backing.identity, read_only=not image.is_writable)
        try:
            backing = inspect_descriptor(fd, what=disk.name)
        except BaseException:
            os.close(fd)
            raise
        wanted = disk.disk._replace(format=image.format, limits=disk.limits)
        try:
            await machine.storage.detach(disk.name)
        except BaseException:
            backing.close()
            raise
        afterwards.push_async_callback(_attach_again, machine, wanted, backing)


async def _attach_again(machine: Running, disk: Disk, backing: Backing) -> None:
    """Attach a disk that was detached for the save. Raises what `Storage.attach` raises."""
    try:
        await machine.storage.attach(disk, backing)
    except VmspawnError as error:
        error.prefix(f"{disk.name} was detached for the snapshot and cannot be attached again: ")
        raise


async def _record(machine: Running) -> Recorded:
    """Record the machine's command line."""
    kind = str(await machine.monitor.execute("qom-get", {"path": "/machine", "property": "type"}))
    return incoming.record(_arguments(machine.pid), kind.removesuffix("-machine"))


def _free_name(machine: str) -> str:
    """Return the first number that no snapshot of the machine has."""
    taken = set(snapshot_files.names())
    return next(str(n) for n in range(1, len(taken) + 2) if f"{machine}@{n}" not in taken)


class _Save:
    """One save."""

    def __init__(self, machine: Running, name: str, is_temporary: bool, on_progress: Progress, parent: str) -> None:
        self._machine = machine
        self._name = name
        self._is_temporary = is_temporary
        self._on_progress = on_progress
        self._files = OpenFiles(machine.pid)
        #: The numbers of descriptors in QEMU, by those on its command line, where they differ.
        self._numbers: dict[int, int] = {}
        #: The attached disks, without those whose attach waits for the end of the save.
        self._disks = [each for each in machine.storage if each.state is AttachmentState.ATTACHED]
        self._was_running = machine.is_running
        self._status = machine.status
        self._pause = 0.0
        #: Open images without a name that are copied while the guest stands still, by the names of their copies.
        self._to_copy: dict[str, int] = {}
        #: Open files that the manifest lists, by their paths.
        self._listed: dict[str, int] = {}
        self._closing = contextlib.ExitStack()
        #: The ids of QEMU's devices.
        self._devices: frozenset[str] = frozenset()
        self._parent = parent
        self._folder_path = ""

    async def run(self) -> Saved:
        recorded = await _record(self._machine)
        await self._check(recorded)
        self._devices = await device_ids(self._machine.monitor)
        folder = NewFolder(f"{self._machine.name}@{self._name}", self._parent)
        freeze = self._machine.storage.freeze()
        with self._closing:
            try:
                return await self._run(recorded, folder, freeze)
            except BaseException as error:
                folder.discard()
                if isinstance(error, OSError):
                    raise SystemFailure("cannot write the snapshot", error.errno or errno.EIO) from None
                raise
            finally:
                self._journal(None)

    async def _run(self, recorded: Recorded, folder: NewFolder, freeze: Freeze) -> Saved:
        machine = self._machine
        self._journal(folder.path)
        self._folder_path = folder.path
        folder.make()
        fd = self._reserve(folder)
        try:
            await self._find_sets(recorded)
            await self._prepare(folder, freeze)
            descriptors = self._descriptors(recorded, folder)
            recorded = _with_own_kernel(recorded, folder)
            begun = time.monotonic()
            try:
                scheme = await self._stop_and_save(fd, recorded)
                # QEMU's descriptor shares its position with ours.
                os.ftruncate(fd, os.lseek(fd, 0, os.SEEK_CUR))
                await asyncio.to_thread(self._copy_written, recorded, folder)
                sizes = await _sizes(machine)
                attachments = self._attachments(freeze)
                manifest = self._manifest(recorded, descriptors, attachments, sizes, folder, scheme)
                self._write_current(manifest, freeze)
                await freeze.switch()
                # Closing an image may have changed it.
                manifest = manifest._replace(files=self._described())
                self._write_current(manifest, freeze)()
                folder.write(snapshot_files.MANIFEST, manifest.to_json())
            finally:
                await self._go_on()
                self._pause = time.monotonic() - begun
            folder.finish()
            await freeze.finish()
            disks = [(each.disk.name, each.base.path, each.overlay.path) for each in freeze.frozen]
            return Saved(manifest, self._pause, disks)
        except BaseException:
            await freeze.undo()
            used = {image.path for disk in machine.storage for image in disk.images}
            snapshot_files.tidy_current(machine.name, used)
            raise

    # Before the pause.

    async def _check(self, recorded: Recorded) -> None:
        found = await blockers.find(self._machine, recorded.options)
        if found:
            raise _blocked(self._machine.name, found)

    def _reserve(self, folder: NewFolder) -> int:
        """Create the file of the state, with room for it, and return a descriptor that is open for writing alone."""
        size = min(_resident(self._machine.pid), self._machine.config.ram_bytes) + _DEVICES_SIZE
        fd = folder.create(_STATE_FILE)
        self._closing.callback(os.close, fd)
        try:
            # QEMU writes from the beginning; what is not needed is given back in the end.
            os.posix_fallocate(fd, 0, size)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise SystemFailure(
                    f"cannot save {self._machine.name}: the state takes up to {size >> 20} MiB in {folder.path}",
                    errno.ENOSPC,
                    hint="remove snapshots, see: vmctl list-snapshots; or use another directory: VMSPAWN_SNAPSHOT_DIR",
                ) from None
            raise
        writing = os.open(os.path.join(folder.path, _STATE_FILE), os.O_WRONLY | os.O_CLOEXEC)
        self._closing.callback(os.close, writing)
        return writing

    async def _prepare(self, folder: NewFolder, freeze: Freeze) -> None:
        for disk in self._disks:
            for image in (each for top in disk.images for each in top.chain):
                self._list(image, folder)
        keep_overlays = self._has_lasting_disks()
        current = path_of(f"{self._machine.name}@{CURRENT}")
        if keep_overlays and freeze.candidates:
            os.makedirs(current, 0o700, exist_ok=True)

        def make(disk: AttachedDisk, number: int, size: int) -> Image:
            path = os.path.join(current, f"{disk.identifiers.device}-{number}.qcow2") if keep_overlays else ""
            return _overlay(disk, number, size, path, current if keep_overlays else snapshot_files.root())

        def open_read_only(disk: AttachedDisk, image: Image) -> int:
            fd = self._open(image)
            if image.backing is not None and disk.disk.cache == "none":
                set_direct(image.backing._replace(fd=fd), True, what=image.path)
            return fd

        await freeze.prepare(make, open_read_only)

    def _has_lasting_disks(self) -> bool:
        """Return whether the machine's disks outlive the machine. The disks of a copy do only with `keep_disks`."""
        fork = self._machine.fork
        return fork is None or fork.keep_disks

    def _open(self, image: Image) -> int:
        assert image.backing is not None
        try:
            return self._files.open(image.backing.identity)
        except OSError as error:
            raise SystemFailure(f"cannot open {image.path or 'an image'} for reading", error.errno or 5) from None

    def _list(self, image: Image, folder: NewFolder) -> None:
        """Find an image's file, and keep it open. One without a name gets one in the snapshot's folder."""
        if image.backing is None:
            return
        fd = self._open(image)
        self._closing.callback(os.close, fd)
        path = path_of_descriptor(fd)
        if not path:
            name = f"image{image.number}"
            path = folder.final(name)
            if not give_name(fd, os.path.join(folder.path, name)):
                self._to_copy[name] = fd
        image.path = path
        self._listed[path] = fd

    async def _find_sets(self, recorded: Recorded) -> None:
        """Find the numbers that QEMU has given to the descriptors in sets."""
        sets = {each["fdset-id"]: each["fds"] for each in await self._machine.monitor.execute("query-fdsets")}
        for number, name in incoming.descriptor_sets(recorded.options).items():
            if sets.get(name):
                self._numbers[number] = int(sets[name][0]["fd"])

    def _open_descriptor(self, number: int) -> int:
        """Open again what a descriptor of the command line is open on. Raises OSError."""
        return self._files.open_number(self._numbers.get(number, number))

    def _descriptors(self, recorded: Recorded, folder: NewFolder) -> dict[int, str]:
        """Return the files behind the descriptors of the command line. Files without a path are copied."""
        found = {}
        writable = incoming.writable_descriptors(recorded.options)
        for number in recorded.descriptors:
            if number in writable:
                found[number] = f"descriptor{number}"
                continue
            fd = self._open_descriptor(number)
            self._closing.callback(os.close, fd)
            path = path_of_descriptor(fd)
            if path:
                self._listed[path] = fd
            else:
                path = f"descriptor{number}"
                keep(fd, os.path.join(folder.path, path))
            found[number] = path
        return found

    def _copy_written(self, recorded: Recorded, folder: NewFolder) -> None:
        """Copy images that cannot have a name, and files that the machine writes to and that are no disks, such as
        UEFI's variables."""
        for name, fd in self._to_copy.items():
            copy(fd, os.path.join(folder.path, name))
            copied = os.open(os.path.join(folder.path, name), os.O_RDONLY | os.O_CLOEXEC)
            self._closing.callback(os.close, copied)
            self._listed[folder.final(name)] = copied
        for number in incoming.writable_descriptors(recorded.options):
            fd = self._open_descriptor(number)
            try:
                # Memory is not synced while the guest stands still; neither is the state.
                is_synced = number != incoming.ram_file(recorded.options)
                copy(fd, os.path.join(folder.path, f"descriptor{number}"), is_synced=is_synced)
            finally:
                os.close(fd)

    # The pause.

    async def _stop_and_save(self, fd: int, recorded: Recorded) -> str:
        await self._machine.monitor.execute("stop")
        has_ram_file = incoming.ram_file(recorded.options) >= 0
        return await stream.save(self._machine.monitor, fd, self._on_progress, has_ram_file=has_ram_file)

    async def _go_on(self) -> None:
        """Bring the guest back to the state that it was in. A paused guest runs for a moment."""
        monitor = self._machine.monitor
        with contextlib.suppress(VmspawnError):
            await stream.forget(monitor)
        # QEMU 7.2 closes removed descriptors only while the guest runs.
        commands = [Command("cont"), stream.REMOVE_FDSET] + ([] if self._was_running else [Command("stop")])
        for command, result in zip(commands, await monitor.execute_all(commands), strict=True):
            if isinstance(result, QmpError) and command is not stream.REMOVE_FDSET:
                raise result

    # The manifest.

    def _attachments(self, freeze: Freeze) -> dict[str, Any]:
        """Return the sections of the journal, with the disks as they were before they got their overlays."""
        bases = {each.disk.name: each.base for each in freeze.frozen}
        journal = self._machine.journal
        found = {name: json.loads(journal.section(name) or "null") for name in journal.section_names}
        sections = {name: value for name, value in found.items() if isinstance(value, dict) and "attachments" in value}
        disks = []
        for each in self._disks:
            images = [bases[each.name]] if each.name in bases else each.images
            disks.append(
                save_disk(
                    each.disk,
                    each.identifiers,
                    each.place,
                    each.serial,
                    images,
                    limits=each.limits,
                    is_boot=each.is_boot,
                    done=each.done,
                )
            )
        sections["storage"]["attachments"] = disks
        for name, key in (("ports", "number"), ("controllers", "name")):
            found_there = [
                each
                for each in sections.get(name, {}).get("attachments", ())
                if (f"stream{each[key]}" if name == "ports" else each.get(key, "scsi1")) in self._devices
            ]
            if name in sections:
                sections[name]["attachments"] = found_there
        return sections

    def _manifest(
        self,
        recorded: Recorded,
        descriptors: dict[int, str],
        attachments: dict[str, Any],
        sizes: dict[str, int],
        folder: NewFolder,
        scheme: str,
    ) -> Manifest:
        machine = self._machine
        state = State(_STATE_FILE, os.stat(os.path.join(folder.path, _STATE_FILE)).st_size, scheme)
        if (number := incoming.ram_file(recorded.options)) >= 0:
            memory = os.stat(os.path.join(folder.path, descriptors[number]))
            state = state._replace(memory=memory.st_blocks * 512)
        images = {
            image.number: image.path
            for disk in self._disks
            for top in disk.images
            for image in top.chain
            if image.path in self._listed
        }
        return Manifest(
            machine.name,
            self._name,
            time.time(),
            machine.fork.snapshot if machine.fork is not None else "",
            self._is_temporary,
            self._was_running,
            _source(machine),
            recorded.options[[option.name for option in recorded.options].index("-machine")].value or "",
            machine.accelerator,
            {field: getattr(machine.config, field) for field in CONFIG_FIELDS},
            recorded.options,
            descriptors,
            attachments,
            sizes,
            images,
            self._described(),
            state,
        )

    def _described(self) -> tuple[SnapshotFile, ...]:
        """Return the files that must stay as they are."""
        return tuple(SnapshotFile.of(path, fd) for path, fd in self._listed.items())

    def _write_current(self, manifest: Manifest, freeze: Freeze) -> Callable[[], None]:
        """Write down where the newest state of the disks will be: it lasts when the machine ends.

        Returns what makes it hold, once the overlays are in. Raises OSError.
        """
        if not self._has_lasting_disks() or not freeze.frozen:
            return lambda: None
        for option in manifest.options:
            if option.name in incoming.BOOT_FILES and option.value and not option.value.startswith("/"):
                kept = os.path.join(path_of(f"{manifest.machine}@{CURRENT}"), option.value)
                _discard(kept)
                _link_or_copy(os.path.join(self._folder_path, option.value), kept)
        newest = {each.disk.name: each.overlay for each in freeze.frozen}
        attachments = json.loads(json.dumps(manifest.attachments))
        for disk in attachments["storage"]["attachments"]:
            if disk["name"] in newest:
                disk["images"] = [newest[disk["name"]].to_state()]
        images = manifest.images | {each.number: each.path for each in newest.values()}
        files = [*manifest.files]
        files += [SnapshotFile.growing(each.overlay.path) for each in freeze.frozen]
        current = manifest._replace(
            name=CURRENT,
            descriptors=self._kept_descriptors(manifest),
            is_temporary=False,
            parent=manifest.full_name,
            attachments=attachments,
            images=images,
            files=tuple(files),
            state=None,
        )
        path = os.path.join(path_of(current.full_name), snapshot_files.MANIFEST)
        with open(os.open(path + ".new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "wb") as file:
            file.write(current.to_json())
            file.flush()
            os.fsync(file.fileno())
        self._closing.callback(_discard, path + ".new")
        return lambda: os.rename(path + ".new", path)

    def _kept_descriptors(self, manifest: Manifest) -> dict[int, str]:
        """Return the files behind the descriptors, for MACHINE@current. The machine keeps its writable files."""
        found = {}
        ram_file = incoming.ram_file(manifest.options)
        for number, name in manifest.descriptors.items():
            if number == ram_file:
                continue  # a machine that boots begins with empty memory
            fd = self._open_descriptor(number)
            try:
                path = path_of_descriptor(fd)
                if not path:
                    kept = os.path.join(path_of(f"{manifest.machine}@{CURRENT}"), name)
                    _discard(kept)
                    keep(fd, kept)
                found[number] = path or name
            finally:
                os.close(fd)
        return found

    def _journal(self, folder: str | None) -> None:
        """Tell a later manager what is under way, and how the guest was before it."""
        text = json.dumps(folder and {"folder": folder, "was_running": self._was_running})
        self._machine.journal.add_section("saving", lambda: text)
        self._machine.journal.write()


def _with_own_kernel(recorded: Recorded, folder: NewFolder) -> Recorded:
    """Keep the kernel and the initrd that QEMU loads again when a copy is reset. Raises OSError."""
    options = []
    for option in recorded.options:
        if option.name in incoming.BOOT_FILES and option.value and not option.value.startswith("/proc/"):
            name = option.name.removeprefix("-")
            _link_or_copy(option.value, os.path.join(folder.path, name))
            option = Option(option.name, name)
        options.append(option)
    return recorded._replace(options=tuple(options))


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        fd = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
        try:
            copy(fd, target)
        finally:
            os.close(fd)


def _discard(path: str) -> None:
    with contextlib.suppress(OSError):
        os.unlink(path)


def _blocked(machine: str, found: list[Blocker]) -> SnapshotBlocked:
    reasons = "; ".join(each.reason for each in found)
    return SnapshotBlocked(f"cannot save {machine}: {reasons}", hint=found[0].hint)


def _overlay(disk: AttachedDisk, number: int, size: int, path: str, folder: str) -> Image:
    """Make an overlay of `size` bytes, at a path or without a name in a folder. Raises OSError."""
    if path:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    else:
        fd = os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        backing = empty_overlay(fd, size, is_direct=disk.disk.cache == "none")
    except BaseException:
        if path:
            os.unlink(path)
        raise
    return Image(number, backing, "qcow2", path)


async def _sizes(machine: Running) -> dict[str, int]:
    found = await machine.monitor.execute("query-named-block-nodes", {"flat": True})
    pivots = {each.identifiers.pivot for each in machine.storage}
    return {each["node-name"]: int(each["image"]["virtual-size"]) for each in found if each.get("node-name") in pivots}


def _arguments(pid: int) -> list[str]:
    """Return the command line of a process."""
    with open(f"/proc/{pid}/cmdline", "rb") as file:
        return [os.fsdecode(each) for each in file.read().split(b"\0")[:-1]]


def _resident(pid: int) -> int:
    """Return the number of bytes of memory that a process has touched, mapped files included."""
    with open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _source(machine: Running) -> Source:
    path = f"/proc/{machine.pid}/exe"
    found = os.stat(path)
    binary = machine.binary.to_state()
    return Source(machine.binary.path, machine.qemu_version, found.st_size, found.st_mtime_ns, binary)
