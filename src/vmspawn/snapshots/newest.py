# SPDX-License-Identifier: LGPL-2.1-or-later
"""Writes MACHINE@current, which lists the newest state of a machine's disks and outlives the machine.

All methods block, so they are called in threads.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

from ..boot import incoming
from ..boot.overlay import empty_overlay
from ..errors import SnapshotExists
from ..images import snapshot_files
from ..storage.backing import set_direct
from ..storage.freeze import Frozen, Wanted
from ..storage.image import Image
from ..storage.saved import load_image
from .directory import CURRENT, check_ours, path_of
from .durable_files import replace_file, write_file
from .kept_files import KeptFiles, link_or_copy
from .manifest import DETACHED, Manifest, SnapshotFile, load
from .open_files import keep, path_of_descriptor


class NewestDisks:
    """The overlays of one save, and the manifest of MACHINE@current if the disks outlive the machine."""

    def __init__(self, machine: str, files: KeptFiles, *, is_lasting: bool) -> None:
        """Prepare the overlays.

        `is_lasting` is False for a copy whose disks are not kept: the overlays have no names.
        """
        self._machine = machine
        self._folder = path_of(f"{machine}@{CURRENT}")
        self._manifest = os.path.join(self._folder, snapshot_files.MANIFEST)
        self._files = files
        self._is_lasting = is_lasting
        #: The MACHINE@current that the new one replaces.
        self._previous: Manifest | None = None

    def open_previous(self, images: Iterable[Image], process: str, *, is_copy: bool) -> None:
        """Read the MACHINE@current that the new one replaces, if there is one.

        `images` are the machine's images, and `process` is its QEMU. Raises SnapshotExists if an earlier machine of the
        name made it; StartError if it is damaged or not in a directory of its own.
        """
        if not self._is_lasting:
            return
        if os.path.lexists(self._folder):
            check_ours(self._folder)
        try:
            with open(self._manifest, "rb") as file:
                previous = load(file.read(), f"{self._machine}@{CURRENT}")
        except FileNotFoundError:
            return
        has_overlays = any(os.path.dirname(image.path) == self._folder for image in images)
        # A copy with disks that are kept wrote it before its QEMU was started.
        if not (is_copy or has_overlays or previous.process == process):
            raise SnapshotExists(
                f"{self._machine}@{CURRENT} has the newest data of an earlier machine {self._machine}",
                hint="start this machine with another name, or end it and remove that machine's snapshots; see: "
                "vmctl list-snapshots",
            )
        self._previous = previous

    def make_overlays(self, wanted: Sequence[Wanted]) -> list[Image]:
        """Make overlays, all or none. Raises OSError."""
        made: list[Image] = []
        if self._is_lasting and wanted:
            os.makedirs(self._folder, 0o700, exist_ok=True)
            check_ours(self._folder)
        try:
            made.extend(map(self._make_overlay, wanted))
        except BaseException:
            self.discard_overlays(made)
            raise
        return made

    def _make_overlay(self, wanted: Wanted) -> Image:
        name = f"{wanted.disk.identifiers.device}-{wanted.number}.qcow2"
        path = os.path.join(self._folder, name) if self._is_lasting else ""
        if path:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        else:
            fd = os.open(snapshot_files.root(), os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            backing = empty_overlay(fd, wanted.size, is_direct=wanted.disk.disk.cache == "none")
        except BaseException:
            if path:
                os.unlink(path)
            raise
        return Image(wanted.number, backing, "qcow2", path)

    @staticmethod
    def discard_overlays(made: Sequence[Image]) -> None:
        """Close and remove overlays that no disk uses."""
        for image in made:
            image.close_backing()
            if image.path:
                with contextlib.suppress(OSError):
                    os.unlink(image.path)

    def open_read_only(self, frozen: Sequence[Frozen]) -> list[int]:
        """Open the images below the overlays for reading, all or none; the caller owns the descriptors.

        Raises SystemFailure.
        """
        with contextlib.ExitStack() as undo:
            found = []
            for each in frozen:
                fd = self._files.open_image(each.base)
                undo.callback(os.close, fd)
                found.append(fd)
                if each.base.backing is not None and each.disk.disk.cache == "none":
                    set_direct(each.base.backing._replace(fd=fd), True, what=each.base.path)
            undo.pop_all()
        return found

    def write(self, manifest: Manifest, folder: str, frozen: Sequence[Frozen]) -> None:
        """Write the manifest of MACHINE@current, which takes effect with `publish`.

        `manifest` is that of the new snapshot, which is in `folder`. Raises OSError.
        """
        if not self._is_lasting or not frozen:
            return
        for option in manifest.options:
            if option.name in incoming.BOOT_FILES and option.value and not option.value.startswith("/"):
                self._keep(folder, option.value)
        # An image without a name of its own has one in each snapshot's directory. It gets another in the directory of
        # MACHINE@current, which outlives the snapshots.
        own = path_of(manifest.full_name)
        moved = {
            path: self._keep(folder, os.path.basename(path))
            for path in manifest.images.values()
            if os.path.dirname(path) == own
        }
        images = {number: moved.get(path, path) for number, path in manifest.images.items()}
        files = (each._replace(path=moved.get(each.path, each.path)) for each in manifest.files)
        current = manifest._replace(
            name=CURRENT,
            descriptors=self._descriptors(manifest),
            is_temporary=False,
            parent=manifest.full_name,
            attachments=_with_overlays(manifest, frozen),
            images=images | {each.overlay.number: each.overlay.path for each in frozen},
            files=(*files, *(SnapshotFile.growing(each.overlay.path) for each in frozen)),
            state=None,
        )
        if self._previous is not None:
            current = with_detached(current, self._previous, self._folder)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._manifest + ".new")
        write_file(self._manifest + ".new", current.to_json())

    def _keep(self, folder: str, name: str) -> str:
        """Keep a file of the new snapshot, which is in `folder`, for MACHINE@current too. Returns its path there."""
        kept = os.path.join(self._folder, name)
        replace_file(kept, partial(link_or_copy, os.path.join(folder, name)))
        return kept

    def publish(self) -> None:
        """Put the written manifest in place, once the disks use the overlays. Raises OSError."""
        with contextlib.suppress(FileNotFoundError):
            os.rename(self._manifest + ".new", self._manifest)

    def _descriptors(self, manifest: Manifest) -> dict[int, str]:
        """Return the files of the command line's descriptors.

        A writable file is the machine's own file, not the copy of it in the snapshot.
        """
        found = {}
        ram_file = incoming.ram_file(manifest.options)
        for number, name in manifest.descriptors.items():
            if number == ram_file:
                continue  # a machine that boots begins with empty memory
            fd = self._files.open_descriptor(number)
            try:
                path = path_of_descriptor(fd)
                if not path:
                    replace_file(os.path.join(self._folder, name), partial(keep, fd))
                found[number] = path or name
            finally:
                os.close(fd)
        return found


def with_detached(current: Manifest, previous: Manifest, folder: str) -> Manifest:
    """Return MACHINE@current with the previous one's overlays in `folder` that belong to no attached disk any more.

    They have the newest data of disks that were detached, or that got another image.
    """
    attached = set(current.images.values())
    images, kept = dict(current.images), []
    storage = previous.attachments["storage"]
    for record in (*storage["attachments"], *storage.get(DETACHED, ())):
        for top in map(load_image, record["images"][:1]):
            path = previous.images.get(top.number, "")
            if os.path.dirname(path) == folder and path not in attached and os.path.exists(path):
                kept.append(record)
                images |= {image.number: previous.images[image.number] for image in top.chain}
    listed = {each.path for each in current.files}
    needed = set(images.values()) - listed
    return current._replace(
        attachments={**current.attachments, "storage": {**current.attachments["storage"], DETACHED: kept}},
        images=images,
        files=(*current.files, *(each for each in previous.files if each.path in needed)),
    )


def _with_overlays(manifest: Manifest, frozen: Sequence[Frozen]) -> dict[str, Any]:
    """Return the sections of the manifest, with the overlays in place of the images below."""
    newest = {each.disk.name: each.overlay for each in frozen}
    storage = manifest.attachments["storage"]
    disks = [
        {**each, "images": [newest[each["name"]].to_state()]} if each["name"] in newest else each
        for each in storage["attachments"]
    ]
    return {**manifest.attachments, "storage": {**storage, "attachments": disks}}
