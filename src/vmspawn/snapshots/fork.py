# SPDX-License-Identifier: LGPL-2.1-or-later
"""Starts a copy of a machine from its snapshot.

The copy has the source's command line (`boot/incoming.py`), with the hot-plugged disks under the same names and at the
same places. Each writable disk gets a new overlay over the snapshot's images.

This module is on the start path and imports next to nothing.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

from ..boot import console, incoming, memory
from ..boot.boot_disk import BootDisk
from ..boot.commandline import Inherited, disk_arguments, monitor_arguments
from ..boot.config import MachineConfig
from ..boot.directory import make_directory
from ..boot.extras import Extras, Owned, fdset
from ..boot.incoming import BOOT_FILES, Option
from ..boot.launch import check_display, open_transcript, start, system_failures
from ..boot.overlay import BASE_NODE, Below, empty_overlay
from ..boot.plan import Plan
from ..boot.qemu import QemuBinary, choose_accelerator, find_qemu
from ..boot.started import Incoming, Started
from ..boot.state import Fork
from ..errors import StartError, UsageError
from ..hotplug import places
from ..images import snapshot_files
from ..network.forward import NETDEV
from ..storage import saved as records
from ..storage.backing import set_direct, take_descriptor
from ..storage.disk import Disk
from ..storage.image import Image
from ..timeouts import SHUTDOWN_TIMEOUT
from . import same_host
from .directory import CURRENT, OpenSnapshot, path_of
from .durable_files import replace_file, write_file
from .manifest import DETACHED, Manifest, SnapshotFile
from .names import free_name, name_in_use
from .open_files import copy_content


@system_failures("start the copy")
def fork(
    given: MachineConfig,
    full_name: str,
    *,
    keep_disks: bool = False,
    force_version: bool = False,
    new_identity: bool = False,
    parent: int = 0,
    on_begin: Callable[[], None] = lambda: None,
) -> Started:
    """Start a copy. `given` has the copy's name, and the options that may differ: console, logs, forwards, timeouts.

    `keep_disks` keeps the copy's disks when it ends. `force_version` allows another QEMU, firmware or processor than
    those that the state was saved with. `new_identity` gives the guest a new host name, machine ID and MAC addresses.
    `parent` is a process that the copy must not outlive, or 0. `on_begin` is called before the first step that has to
    be undone.

    Raises NoSuchSnapshot, SnapshotInUse, SnapshotExists, StartError, UsageError; nothing is left behind then.
    """
    with contextlib.closing(OpenSnapshot(full_name, wait=False)) as snapshot:
        config = _config(snapshot.manifest, given)
        what = Fork(full_name, keep_disks)
        return start_copy(
            snapshot,
            config,
            what,
            force_version=force_version,
            new_identity=new_identity,
            parent=parent,
            on_begin=on_begin,
        )


def start_copy(
    snapshot: OpenSnapshot,
    config: MachineConfig,
    fork: Fork | None,
    *,
    force_version: bool = False,
    new_identity: bool = False,
    parent: int = 0,
    on_begin: Callable[[], None] = lambda: None,
    shown: bytes = b"",
) -> Started:
    """Start a copy from an open snapshot, which the caller closes. `shown` is the console's earlier output.

    `fork` is None for a warm start, which users do not see as a copy. Raises the errors of `fork`.
    """
    with ExitStack() as undo:
        owned = Owned(undo, undo.enter_context(ExitStack()))
        manifest = snapshot.manifest
        binary = _binary(manifest, force_version=force_version)
        if not force_version:
            same_host.check(manifest)
        if manifest.accelerator == "kvm":
            choose_accelerator("yes", binary.architecture)
        on_begin()
        transcript = open_transcript(config.console_log, undo)
        directory, watcher = make_directory(config, undo, parent)
        copy = _Copy(snapshot, config, binary, owned, fork)
        state = copy.open_state(shown)
        if state is not None:
            state = state._replace(new_identity=new_identity)
        plan = copy.plan()
        started = start(plan, directory, transcript, owned, line=copy.command_line, incoming=state)
        started = started._replace(watcher=watcher)
        owned.lent.close()
        undo.pop_all()
    return started


def _config(manifest: Manifest, given: MachineConfig) -> MachineConfig:
    """Return the copy's configuration. Raises UsageError, StartError for options that the copy cannot have."""
    _check_console(manifest, given)
    if given.forwards and not _has_option(manifest, "-netdev", f"user,id={NETDEV}"):
        raise UsageError.with_fields(
            "{forwards=} needs a network card, and {machine} was saved without one",
            hint="start the source with {network_user=True}",
            machine=manifest.full_name,
        )
    saved = MachineConfig(**manifest.config)
    timeout = saved.shutdown_timeout if given.shutdown_timeout == SHUTDOWN_TIMEOUT else given.shutdown_timeout
    return saved._replace(
        name=given.name or free_name(manifest.machine),
        console=given.console,
        terminal=given.terminal,
        console_log=given.console_log,
        forwards=given.forwards,
        registration=given.registration,
        agent=any(option.name == incoming.AGENT for option in manifest.options),
        shutdown_timeout=timeout,
        die_with_program=given.die_with_program,
        die_with_parent=given.die_with_parent,
        qmp_log=given.qmp_log,
    )


def _check_console(manifest: Manifest, given: MachineConfig) -> None:
    """Raise UsageError, StartError for a console that the copy cannot have."""
    if given.console == "native":
        raise UsageError.with_fields("a copy does not work with {console=native}", hint="use another {console=}")
    if given.console != "gui":
        return
    if not _has_option(manifest, "-display", "gtk"):
        raise UsageError.with_fields(
            "{console=gui} needs a display device, and {machine} was saved without one",
            hint="start the source with {console=gui}",
            machine=manifest.full_name,
        )
    check_display(given)


def _has_option(manifest: Manifest, name: str, value: str) -> bool:
    return Option(name, value) in manifest.options


def _binary(manifest: Manifest, *, force_version: bool) -> QemuBinary:
    """Return the QEMU that saved the state. Raises StartError if the file has changed since."""
    source = manifest.qemu
    machine_type = manifest.config["machine_type"]
    found = find_qemu(source.path, machine_type)
    file = os.stat(found.path)
    if force_version or (file.st_size, file.st_mtime_ns) == (source.size, source.mtime_ns):
        return found
    version = ".".join(map(str, found.version))
    raise StartError(
        f"snapshot {manifest.full_name} was saved by QEMU {source.version}, and {source.path} has changed since "
        f"(QEMU {version})",
        hint=same_host.HINT,
    )


class _Copy:
    """A copy that is being started."""

    def __init__(
        self, snapshot: OpenSnapshot, config: MachineConfig, binary: QemuBinary, owned: Owned, fork: Fork | None
    ) -> None:
        self._fork = fork
        self._keep_disks = fork is not None and fork.keep_disks
        #: The directory of the disks that are kept.
        self._folder = path_of(f"{config.name}@{CURRENT}")
        self._snapshot = snapshot
        self._manifest = snapshot.manifest
        self._config = config
        self._binary = binary
        self._owned = owned
        self._files = {each.path: each for each in self._manifest.files}
        #: The copy's descriptors, by the numbers of the source's descriptors.
        self._descriptors: dict[int, int] = {}
        self._state = Extras()
        #: The copy's own files that are kept, by the numbers of the source's descriptors.
        self._own_files: dict[int, str] = {}
        #: The image below the overlay that the source started with: its block node, and its descriptor in this process.
        self._below: tuple[dict[str, object], int] | None = None
        self._options: list[incoming.Option] = []

    def plan(self) -> Plan:
        """Open the files, and return the plan that the command line is written from. Raises StartError."""
        if self._keep_disks:
            self._make_folder()
        ram_file = incoming.ram_file(self._manifest.options)
        written = set(incoming.writable_descriptors(self._manifest.options)) - {ram_file}
        for number, path in self._manifest.descriptors.items():
            fd = self._owned.lend(self._open(path))
            self._descriptors[number] = self._owned.lend(self._own(number, fd, path)) if number in written else fd
        self._options, below, number = incoming.take_node(self._manifest.options, BASE_NODE)
        self._options = [self._with_display(self._with_path(option)) for option in self._options]
        if self._manifest.state is not None:
            self._options = [incoming.with_private_memory(option) for option in self._options]
        elif ram_file >= 0:
            self._descriptors[ram_file] = memory.in_file(self._config.ram_bytes, self._owned).descriptors[0]
        self._below = (below, self._descriptors[number]) if below else None
        layout = places.layout(
            self._config.machine_type, self._config.hotplug_ports, namespaces=self._binary.has_namespaces
        )
        incoming.claim_places(self._manifest.options, layout.pci.claim)
        disks = []
        for disk in self._disks():
            self._owned.lent.callback(disk.close)
            layout.pci.claim(disk.place)
            disks.append(disk)
        if self._keep_disks:
            self._write_current(disks)
        inherited = (*self._state.descriptors, *self._descriptors.values(), self._snapshot.fd)
        return Plan(
            self._config,
            self._binary,
            self._manifest.accelerator,
            layout,
            None,
            tuple(disks),
            Extras(arguments=self._state.arguments, descriptors=inherited),
            attachments=self._manifest.attachments,
            fork=self._fork,
        )

    def _make_folder(self) -> None:
        """Make the directory of the disks that are kept. A failed start removes it, unless it has other files.

        Raises SnapshotExists if the disks of an earlier machine of this name are there.
        """
        name = self._config.name or ""
        # A manager that was killed may have left overlays without a manifest.
        snapshot_files.tidy_current(name, set())
        try:
            os.mkdir(self._folder, 0o700)
        except FileExistsError:
            raise name_in_use(name) from None
        self._owned.undo.callback(_remove_if_empty, self._folder)
        # Until the manifest lists the overlays, other processes must not take them for remains.
        fd = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._owned.lent.callback(os.close, fd)
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def _with_path(self, option: Option) -> Option:
        """Return the option with an absolute path, if it names a file in the snapshot's directory."""
        if option.name in BOOT_FILES and option.value and not option.value.startswith("/"):
            return Option(option.name, os.path.join(self._snapshot.path, option.value))
        return option

    def _with_display(self, option: Option) -> Option:
        """Return the option without the source's window, unless the copy has one too."""
        is_hidden = option.name == "-display" and self._config.console != "gui"
        return Option("-display", "none") if is_hidden else option

    def open_state(self, shown: bytes) -> Incoming | None:
        """Open the saved state. Returns None for a snapshot without a state: the machine boots. Raises StartError."""
        state = self._manifest.state
        if state is None:
            return None
        fd = self._owned.lend(self._open(state.file))
        has_ram_file = incoming.ram_file(self._manifest.options) >= 0
        if os.fstat(fd).st_size != state.size:
            raise StartError(f"the state of snapshot {self._manifest.full_name} is incomplete")
        was_running = self._manifest.was_running
        if state.scheme == "fd":
            self._state = Extras(descriptors=(fd,))
            return Incoming(f"fd:{fd}", was_running, shown, has_ram_file=has_ram_file)
        self._state = fdset(incoming.STATE_FDSET, fd)
        uri = f"file:/dev/fdset/{incoming.STATE_FDSET}"
        return Incoming(uri, was_running, shown, has_ram_file=has_ram_file)

    def command_line(self, plan: Plan, inherited: Inherited) -> list[str]:
        """Return QEMU's command line."""
        arguments = {
            incoming.MONITORS: monitor_arguments(plan.binary, inherited.monitors),
            incoming.CONSOLE: console.shared_end(inherited.log),
            incoming.SIZE: console.socket_end("size", inherited.size),
            incoming.AGENT: console.socket_end("agent", inherited.agent),
            incoming.DISKS: [
                *_controllers(self._manifest),
                *disk_arguments(plan.disks),
                *port_arguments(self._manifest),
            ],
        }
        defer = ["-incoming", "defer"] if self._manifest.state is not None else []
        return [
            plan.binary.path,
            *("-name", f"{self._config.name},process=vmspawn-qemu"),
            *plan.extras.arguments,
            *incoming.rebuild(self._options, arguments, self._descriptors),
            *defer,
        ]

    def _open(self, path: str) -> int:
        """Open a file of the snapshot for reading. Raises StartError if the file has changed since the save."""
        name = self._manifest.full_name
        try:
            fd = os.open(os.path.join(self._snapshot.path, path), os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise StartError(f"snapshot {name} is incomplete: cannot open {path}: {error.strerror}") from None
        if (was := self._files.get(path)) is not None and not was.is_unchanged(fd):
            os.close(fd)
            raise StartError(f"{path} has changed since snapshot {name} was made")
        return fd

    # Disks.

    def _disks(self) -> Iterator[BootDisk]:
        storage = self._manifest.attachments["storage"]
        number = int(storage["next"])
        for record in storage["attachments"]:
            disk = records.load_disk(record)
            image = self._image(record, disk, number)
            number += 1
            yield BootDisk(
                disk,
                records.load_identifiers(record),
                records.load_place(disk.bus, record["place"]),
                image,
                str(record["serial"]),
                self._below_of(record),
                is_boot=bool(record["boot"]),
            )

    def _below_of(self, record: dict[str, Any]) -> Below | None:
        """Return the image below a disk's lowest overlay. Only the first disk, the machine's image, has one."""
        if self._below is None or record["number"] != 0:
            return None
        node, fd = self._below
        return Below(os.dup(fd), node)

    def _image(self, record: dict[str, Any], disk: Disk, number: int) -> Image | None:
        if not record["images"]:
            return None
        image = records.load_image(record["images"][0])
        is_writable = image.is_writable
        try:
            for each in image.chain:
                self._open_image(each, disk)
            return self._overlay(disk, image, record, number) if is_writable else image
        except BaseException:
            image.close_backing()
            raise

    def _open_image(self, image: Image, disk: Disk) -> None:
        path = self._manifest.images[image.number]
        image.backing = take_descriptor(self._open(path), what=path)
        set_direct(image.backing, disk.cache == "none", what=path)
        image.path = path

    def _overlay(self, disk: Disk, base: Image, record: dict[str, Any], number: int) -> Image:
        """Make an overlay for the copy, which is removed with the copy unless the disks are kept."""
        identifiers = records.load_identifiers(record)
        size = self._manifest.sizes[identifiers.pivot]
        path, fd = self._create(f"{identifiers.device}-{number}.qcow2")
        backing = empty_overlay(fd, size, is_direct=disk.cache == "none")
        return Image(number, backing, "qcow2", path, base=base)

    def _write_current(self, disks: list[BootDisk]) -> None:
        """Write MACHINE@current, which lists the newest images of disks that outlive the machine. Raises OSError."""
        manifest = self._manifest
        overlays = {each.name: each.image for each in disks if each.image is not None and each.image.is_writable}
        attachments = {name: dict(section) for name, section in manifest.attachments.items()}
        # These disks belong to the source.
        attachments["storage"].pop(DETACHED, None)
        attachments["storage"]["attachments"] = [
            {**each, "images": [overlays[each["name"]].to_state()]} if each["name"] in overlays else each
            for each in attachments["storage"]["attachments"]
        ]
        numbers = [each.number for each in overlays.values()]
        attachments["storage"]["next"] = max([int(attachments["storage"]["next"]), *(each + 1 for each in numbers)])
        names = {number: os.path.join(self._snapshot.path, path) for number, path in manifest.descriptors.items()}
        # A machine that boots begins with empty memory.
        names.pop(incoming.ram_file(manifest.options), None)
        names |= {number: os.path.join(self._folder, path) for number, path in self._own_files.items()}
        # The new manifest needs these files of the snapshot, which therefore cannot be removed.
        boot_files = [self._with_path(option).value or "" for option in manifest.options if option.name in BOOT_FILES]
        shared = [path for path in (*names.values(), *boot_files) if os.path.dirname(path) == self._snapshot.path]
        current = manifest._replace(
            machine=self._config.name or "",
            name=CURRENT,
            created=time.time(),
            parent=manifest.full_name,
            is_temporary=False,
            is_copy=True,
            process="",
            descriptors=names,
            options=tuple(self._with_path(option) for option in manifest.options),
            attachments=attachments,
            images=manifest.images | {each.number: each.path for each in overlays.values()},
            files=(*manifest.files, *map(SnapshotFile.growing, [*(each.path for each in overlays.values()), *shared])),
            state=None,
        )
        path = os.path.join(self._folder, snapshot_files.MANIFEST)
        replace_file(path, lambda new: write_file(new, current.to_json()))
        self._owned.undo.callback(os.unlink, path)

    def _own(self, number: int, fd: int, name: str) -> int:
        """Copy a small file. The new file is removed with the machine unless the disks are kept."""
        path, copy = self._create(os.path.basename(name))
        if path:
            self._own_files[number] = os.path.basename(path)
        copy_content(fd, copy)
        return copy

    def _create(self, name: str) -> tuple[str, int]:
        flags = os.O_RDWR | os.O_CLOEXEC
        if not self._keep_disks:
            return "", os.open(os.path.dirname(self._snapshot.path), flags | os.O_TMPFILE, 0o600)
        path = os.path.join(self._folder, name)
        fd = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o600)
        self._owned.undo.callback(os.unlink, path)
        return path, fd


def _remove_if_empty(folder: str) -> None:
    with contextlib.suppress(OSError):
        os.rmdir(folder)


def _controllers(manifest: Manifest) -> list[str]:
    """Return QEMU's arguments for the controllers of hot-plugged disks, in the order of the controllers' records."""
    import json

    arguments = []
    for section in manifest.attachments.get("controllers", {}).get("attachments", ()):
        if section.get("name", places.THREADED_SCSI_CONTROLLER) != places.THREADED_SCSI_CONTROLLER:
            continue  # the controller from boot is among the options
        place = records.load_pci_place(section["place"])
        thread = {"qom-type": "iothread", "id": "scsi-thread"}
        device = {"driver": "virtio-scsi-pci", "id": places.THREADED_SCSI_CONTROLLER, "iothread": "scsi-thread"}
        arguments += ["-object", json.dumps(thread), "-device", json.dumps({**device, **place.properties()})]
    return arguments


def port_arguments(manifest: Manifest) -> list[str]:
    """Return QEMU's arguments for the ports of commands in the guest, which are not connected in a copy."""
    import json

    arguments = []
    for section in manifest.attachments.get("ports", {}).get("attachments", ()):
        name, (bus, number) = f"stream{section['number']}", section["place"]
        device = {"driver": "virtserialport", "id": name, "chardev": name, "name": section["name"]}
        arguments += ["-chardev", f"null,id={name}", "-device", json.dumps({**device, "bus": bus, "nr": number})]
    return arguments
