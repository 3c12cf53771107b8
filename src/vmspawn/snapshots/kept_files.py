# SPDX-License-Identifier: LGPL-2.1-or-later
"""Collects the files that a snapshot consists of: the state, the images, the firmware, the kernel and the initrd.

Files with a path stay where they are. The other files get a name in the snapshot's directory. All functions block, so
they are called in threads.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterable, Mapping, Sequence

from ..aio.programs import check_cancelled
from ..boot import incoming
from ..boot.incoming import Option, Recorded
from ..errors import SystemFailure
from ..storage.image import Image
from .directory import NewFolder, sync
from .manifest import Firmware, SnapshotFile
from .open_files import OpenFiles, copy, give_name, keep, path_of_descriptor
from .same_host import hash_of

#: The file of the state in the snapshot's directory.
STATE_FILE = "state"

#: Bytes reserved for the state of devices, and for the headers of overlays.
_DEVICES_SIZE = 16 << 20

#: Bytes that are reserved between two checks for a cancellation.
_RESERVE_SIZE = 256 << 20

#: The block node of the UEFI firmware.
_FIRMWARE_NODE = "firmware-code"


class KeptFiles:
    """The files of a snapshot, kept open until `close`."""

    def __init__(self, pid: int, folder: NewFolder) -> None:
        self._folder = folder
        self._files = OpenFiles(pid)
        #: The numbers of descriptors in QEMU, by their numbers on its command line, if they differ.
        self._numbers: dict[int, int] = {}
        #: Open images without a name that are copied while the guest is stopped, by the names of their copies.
        self._to_copy: dict[str, int] = {}
        #: Open files that the manifest lists, by their paths.
        self._listed: dict[str, int] = {}
        self._closing = contextlib.ExitStack()
        #: The path of the file that the guest's memory was copied to.
        self._memory = ""

    def close(self) -> None:
        """Close all files."""
        self._closing.close()

    def reserve_state(self, machine: str, size: int) -> int:
        """Create the file of the state with space for `size` bytes, and return a write-only descriptor.

        Raises SystemFailure, OSError.
        """
        size += _DEVICES_SIZE
        fd = self._folder.create(STATE_FILE)
        self._closing.callback(os.close, fd)
        try:
            # QEMU writes from the beginning; `copy_written` frees the rest.
            for offset in range(0, size, _RESERVE_SIZE):
                check_cancelled()
                os.posix_fallocate(fd, offset, min(_RESERVE_SIZE, size - offset))
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise SystemFailure(
                    f"cannot save {machine}: the state takes up to {size >> 20} MiB in {self._folder.path}",
                    errno.ENOSPC,
                    hint="remove snapshots, see: vmctl list-snapshots; or use another directory: VMSPAWN_SNAPSHOT_DIR",
                ) from None
            raise
        writing = os.open(os.path.join(self._folder.path, STATE_FILE), os.O_WRONLY | os.O_CLOEXEC)
        self._closing.callback(os.close, writing)
        return writing

    def list_images(self, images: Iterable[Image]) -> None:
        """Find the files of images. Those without a name get one in the snapshot's directory. Raises SystemFailure."""
        for image in images:
            if image.backing is None:
                continue
            fd = self.open_image(image)
            self._closing.callback(os.close, fd)
            path = path_of_descriptor(fd)
            if not path:
                name = f"image{image.number}"
                path = self._folder.final(name)
                if not give_name(fd, os.path.join(self._folder.path, name)):
                    self._to_copy[name] = fd
            image.path = path
            self._listed[path] = fd

    def open_image(self, image: Image) -> int:
        """Open an image of the machine for reading; the caller owns the descriptor. Raises SystemFailure."""
        assert image.backing is not None
        try:
            return self._files.open(image.backing.identity)
        except OSError as error:
            raise SystemFailure(f"cannot open {image.path or 'an image'} for reading", error.errno or 5) from None

    def paths_of(self, images: Iterable[Image]) -> dict[int, str]:
        """Return the paths of the images that are part of the snapshot, by number."""
        return {image.number: image.path for image in images if image.path in self._listed}

    def find_descriptors(self, recorded: Recorded, sets: Mapping[int, Sequence[Mapping[str, int]]]) -> None:
        """Find QEMU's numbers of the descriptors on the command line. `sets` are QEMU's descriptor sets."""
        for number, name in incoming.descriptor_sets(recorded.options).items():
            if sets.get(name):
                self._numbers[number] = int(sets[name][0]["fd"])

    def open_descriptor(self, number: int) -> int:
        """Reopen the file of a descriptor on the command line. Raises OSError."""
        return self._files.open_number(self._numbers.get(number, number))

    def list_descriptors(self, recorded: Recorded) -> dict[int, str]:
        """Return the files of the command line's descriptors, by number.

        Files without a path get one in the snapshot's directory. Raises OSError.
        """
        found = {}
        writable = incoming.writable_descriptors(recorded.options)
        firmware = incoming.take_node(recorded.options, _FIRMWARE_NODE)[2]
        for number in recorded.descriptors:
            if number in writable:
                found[number] = f"descriptor{number}"
                continue
            fd = self.open_descriptor(number)
            self._closing.callback(os.close, fd)
            path = path_of_descriptor(fd)
            if not path:
                path = f"descriptor{number}"
                keep(fd, os.path.join(self._folder.path, path))
            elif number != firmware:
                # The manifest has the hash of the firmware.
                self._listed[path] = fd
            found[number] = path
        return found

    def firmware(self, recorded: Recorded) -> Firmware | None:
        """Return the firmware that the machine was started with, unless it is QEMU's own.

        Raises StartError, OSError.
        """
        number = incoming.take_node(recorded.options, _FIRMWARE_NODE)[2]
        if number < 0:
            path = incoming.value_of(recorded.options, "-bios")
            return Firmware(path, hash_of(path)) if path else None
        fd = self.open_descriptor(number)
        try:
            return Firmware(path_of_descriptor(fd), hash_of(f"/proc/self/fd/{fd}"))
        finally:
            os.close(fd)

    def keep_boot_files(self, recorded: Recorded) -> Recorded:
        """Keep the kernel and the initrd that QEMU loads again when a copy is reset. Raises OSError."""
        options = []
        for option in recorded.options:
            if option.name in incoming.BOOT_FILES and option.value and not option.value.startswith("/proc/"):
                name = option.name.removeprefix("-")
                link_or_copy(option.value, os.path.join(self._folder.path, name))
                option = Option(option.name, name)
            options.append(option)
        return recorded._replace(options=tuple(options))

    def copy_written(self, recorded: Recorded, state: int) -> None:
        """Copy images that could not be given a name, and other files that QEMU writes to, such as UEFI's variables.

        Truncates the state's file to its content. Raises OSError.
        """
        # QEMU's descriptor and this one share their position.
        os.ftruncate(state, os.lseek(state, 0, os.SEEK_CUR))
        for name, fd in self._to_copy.items():
            copy(fd, os.path.join(self._folder.path, name), on_step=check_cancelled)
            copied = os.open(os.path.join(self._folder.path, name), os.O_RDONLY | os.O_CLOEXEC)
            self._closing.callback(os.close, copied)
            self._listed[self._folder.final(name)] = copied
        for number in incoming.writable_descriptors(recorded.options):
            fd = self.open_descriptor(number)
            path = os.path.join(self._folder.path, f"descriptor{number}")
            # Memory is synced after the pause, as the state is, to keep the pause short.
            is_memory = number == incoming.ram_file(recorded.options)
            try:
                copy(fd, path, is_synced=not is_memory, on_step=check_cancelled)
            finally:
                os.close(fd)
            if is_memory:
                self._memory = path

    def memory_size(self) -> int:
        """Return the bytes of the file that the guest's memory was copied to, or 0 if the memory is not in a file."""
        return os.stat(self._memory).st_blocks * 512 if self._memory else 0

    def sync_memory(self) -> None:
        """Write the copied memory to the disk. Raises OSError."""
        if self._memory:
            sync(self._memory)

    def described(self) -> tuple[SnapshotFile, ...]:
        """Return the files that must not change."""
        return tuple(SnapshotFile.of(path, fd) for path, fd in self._listed.items())


def link_or_copy(source: str, target: str) -> None:
    """Make a hard link to a file, or copy it to another file system. Raises OSError."""
    try:
        os.link(source, target)
    except OSError:
        fd = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
        try:
            copy(fd, target)
        finally:
            os.close(fd)
