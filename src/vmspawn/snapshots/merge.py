# SPDX-License-Identifier: LGPL-2.1-or-later
"""Merges the overlays of a machine that has ended into the images below, once no snapshot needs these images.

MACHINE@current lists overlays that are based on images of snapshots. When the last snapshot is removed, a QEMU without
a guest writes each overlay's content to the image below (`block-commit`), and MACHINE@current is removed. If the
writing is interrupted, the overlays are unchanged, and take precedence over the partly written images.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shlex
import stat
import subprocess
import time
from collections.abc import Iterable, Mapping
from typing import Any

from ..aio.programs import CANCELLER, check_cancelled
from ..aio.sockets import is_readable
from ..errors import NoSuchSnapshot, QmpError, SnapshotInUse, SystemFailure, Timeout, VmspawnError
from ..host import die_with_parent
from ..images import snapshot_files
from ..storage.image import Image
from ..storage.saved import load_image
from . import directory
from .directory import CURRENT, OpenSnapshot, is_locked
from .manifest import DETACHED, Manifest, SnapshotFile

#: Seconds that a QEMU without a guest may take to answer, and to exit.
_TIMEOUT = 600.0

#: Seconds without progress after which the writing of an overlay fails. A large overlay may take hours.
_PROGRESS_TIMEOUT = 600.0


def after_end(*machines: str) -> list[SystemFailure]:
    """Remove unused snapshots that were made for copies, and overlays of machines without a snapshot.

    Called after machines or copies have ended.

    Returns an error for each machine whose disks stay on overlays because of a failure.
    """
    sources = directory.remove_temporary()
    found = []
    for name in sorted({*machines, *sources}):
        try:
            merge(name)
        except SystemFailure as error:
            found.append(error)
    return found


def merge(machine: str) -> bool:
    """Merge each disk of a machine into one file. Returns False if that must wait, or if there is nothing to do.

    Raises SystemFailure. Nothing is lost then, and `merge` can be called again. Raises Cancelled if the work of this
    thread is cancelled.
    """
    try:
        return _merge(machine)
    except (VmspawnError, OSError, subprocess.SubprocessError) as error:
        number = getattr(error, "errno", None) or errno.EIO
        advice = getattr(error, "hint", "") or f"to boot from the disks: vmspawn --fork={machine}@{CURRENT}"
        raise SystemFailure(
            f"the disks of {machine} stay on overlays, because the overlays cannot be written to the images"
            + _reason(error, number),
            number,
            hint=f"nothing is lost; {advice}; to try again: vmctl remove-snapshot {machine}@{CURRENT}",
        ) from None


def _reason(error: Exception, number: int) -> str:
    """Return the reason of a failure with a colon in front, without the text of the error number, which follows it."""
    if isinstance(error, OSError):
        return f": cannot open {error.filename}" if error.filename else ""
    return f": {str(error).removesuffix(f': {os.strerror(number)}')}"


def _merge(machine: str) -> bool:
    full_name = f"{machine}@{CURRENT}"
    if full_name not in snapshot_files.names():
        return False
    try:
        snapshot = OpenSnapshot(full_name, wait=False)
    except (NoSuchSnapshot, SnapshotInUse):
        return False  # another process merges or removes it
    with contextlib.closing(snapshot):
        if not _lock_alone(snapshot):
            return False
        chains = [image.chain for image in _tops(snapshot.manifest) if image.base is not None]
        _set_paths(chains, snapshot.manifest)
        if not can_be_merged(snapshot.manifest) or not _are_free(full_name, chains):
            return False
        _check_images(snapshot, chains)
        _expect_changes(snapshot, chains)
        _commit(snapshot.manifest.qemu.path, chains)
        with contextlib.suppress(NoSuchSnapshot):
            # The lock is still held: no other process can start a machine on the overlays before they are removed.
            snapshot.remove()
    return True


def _lock_alone(snapshot: OpenSnapshot) -> bool:
    """Lock the snapshot exclusively. Returns False if another process uses it, or has removed it."""
    try:
        return snapshot.lock_alone()
    except (NoSuchSnapshot, SnapshotInUse):
        return False


def can_be_merged(manifest: Manifest) -> bool:
    """Return whether overlays can be written to the images below.

    A copy's overlays cannot, because the images belong to its source.
    """
    return not manifest.is_copy and any(image.base is not None for image in _tops(manifest))


def _tops(manifest: Manifest) -> Iterable[Image]:
    storage = manifest.attachments.get("storage", {})
    for record in (*storage.get("attachments", ()), *storage.get(DETACHED, ())):
        yield from map(load_image, record["images"][:1])


def _set_paths(chains: Iterable[list[Image]], manifest: Manifest) -> None:
    for image in (image for chain in chains for image in chain):
        image.path = manifest.images[image.number]


def _are_free(full_name: str, chains: Iterable[list[Image]]) -> bool:
    """Return whether no other snapshot needs the images, under any path, and no QEMU uses one of them."""
    manifests = dict(snapshot_files.readings())
    if None in manifests.values():
        return False  # the unreadable one may need the images
    paths = {image.path for chain in chains for image in chain}
    needed = [each for name, found in manifests.items() if found and name != full_name for each in found["files"]]
    if paths & {each["path"] for each in needed} or any(map(is_locked, paths)):
        return False
    identities = {(found.st_dev, found.st_ino) for found in map(os.stat, paths)}
    return not identities & {(each["device"], each["inode"]) for each in needed}


def _check_images(snapshot: OpenSnapshot, chains: Iterable[list[Image]]) -> None:
    """Check that the images below the overlays are the files that the snapshot was made of. Raises SystemFailure.

    Files in the snapshot's directory are not checked: some are copies of the recorded files.
    """
    recorded = {each.path: each for each in snapshot.manifest.files}
    for image in (image for chain in chains for image in chain[1:]):
        if os.path.dirname(image.path) != snapshot.path:
            _check_image(image, recorded.get(image.path))


def _check_image(image: Image, was: SnapshotFile | None) -> None:
    path = image.path
    found = os.stat(path)
    if image.backing is not None and image.backing.is_block_device:
        # The time of a device's file changes with each event of the device, so only the device's number is compared.
        if not stat.S_ISBLK(found.st_mode) or image.backing.identity != (found.st_rdev,):
            raise _changed(f"{path} is not the block device that the snapshot was made of", f"put it back at {path}")
        return
    is_unchanged = was is not None and (was.size, was.mtime_ns) == (found.st_size, found.st_mtime_ns)
    # The number of a file system can change when the host boots.
    if was is None or found.st_ino != was.inode or not (is_unchanged or found.st_dev == was.device):
        raise _changed(f"{path} is not the file that the snapshot was made of", f"put the original file back at {path}")
    # An interrupted merge may have changed a file whose recorded size is -1.
    if was.size >= 0 and not is_unchanged:
        seconds, fraction = divmod(was.mtime_ns, 10**9)
        raise _changed(
            f"{path} has changed since the snapshot was made",
            "restore its content from a backup; if only its time has changed: "
            f"touch -d @{seconds}.{fraction:09} {shlex.quote(path)}",
        )


def _changed(message: str, advice: str) -> SystemFailure:
    return SystemFailure(message, errno.ESTALE, hint=advice)


def _expect_changes(snapshot: OpenSnapshot, chains: Iterable[list[Image]]) -> None:
    """Record in the manifest that the images below may change: the overlays take precedence."""
    paths = {image.path for chain in chains for image in chain}
    manifest = snapshot.manifest
    changed = manifest._replace(
        files=tuple(each._replace(size=-1) if each.path in paths else each for each in manifest.files)
    )
    snapshot.replace(changed)


def _commit(qemu: str, chains: list[list[Image]]) -> None:
    """Write the content of all overlays to the images at the bottom. Raises QmpError, SystemFailure, Timeout."""
    nodes = [node for number, chain in enumerate(chains) for node in _nodes(number, chain)]
    options = [word for node in nodes for word in ("-blockdev", json.dumps(node))]
    command = [
        qemu,
        "-machine",
        "none",
        "-nodefaults",
        "-no-user-config",
        "-display",
        "none",
        "-qmp",
        "stdio",
        *options,
    ]
    pipe = subprocess.PIPE
    canceller = CANCELLER.get()
    check_cancelled()
    # QEMU does not exit at the end of its standard input.
    bound = die_with_parent.command(command)
    with subprocess.Popen(bound, stdin=pipe, stdout=pipe, stderr=pipe, bufsize=0) as process:
        try:
            if canceller is not None:
                canceller.watch(process)
            talk = _Talk(process)
            talk.execute("qmp_capabilities")
            for number, chain in enumerate(chains):
                job, bottom = f"merge{number}", f"disk{number}-{len(chain) - 1}"
                talk.execute("block-commit", {"job-id": job, "device": f"disk{number}-0", "base-node": bottom})
                ended = talk.event(job, "BLOCK_JOB_READY", "BLOCK_JOB_COMPLETED")
                if "error" not in ended:
                    talk.execute("block-job-complete", {"device": job})
                    ended = talk.event(job, "BLOCK_JOB_COMPLETED")
                if error := ended.get("error"):
                    raise _cannot_write(chain[-1].path, error)
            talk.execute("quit")
            process.wait(_TIMEOUT)
        finally:
            process.kill()
            if canceller is not None:
                canceller.watch(None)
                canceller.check()


def _cannot_write(path: str, said: str) -> SystemFailure:
    """Return the error for a commit that failed. QEMU describes the system's error, without its number."""
    if said == os.strerror(errno.ENOSPC):
        return SystemFailure(f"cannot write to {path}", errno.ENOSPC)
    return SystemFailure(f"cannot write to {path} ({said})", errno.EIO)


def _nodes(number: int, chain: list[Image]) -> list[dict[str, object]]:
    """Return the block nodes of a disk, from the bottom up."""
    found: list[dict[str, object]] = []
    for level, image in reversed(list(enumerate(chain))):
        is_block = image.backing is not None and image.backing.is_block_device
        file = {"driver": "host_device" if is_block else "file", "filename": image.path}
        node: dict[str, object] = {"driver": image.format, "node-name": f"disk{number}-{level}", "file": file}
        if level < len(chain) - 1:
            node["backing"] = f"disk{number}-{level + 1}"
        elif image.format == "qcow2":
            node["backing"] = None
        found.append({**node, "read-only": level > 0})
    return found


class _Talk:
    """A QMP connection to a child process, one command at a time."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._process = process
        self._input, self._output = process.stdin, process.stdout
        self._buffer = b""
        self._events: list[Mapping[str, Any]] = []
        self._message()

    def execute(self, command: str, arguments: Mapping[str, object] | None = None) -> Any:
        """Run a command, and return its result. Raises QmpError, SystemFailure, Timeout."""
        self._input.write(json.dumps({"execute": command, "arguments": arguments or {}}).encode())
        while "event" in (message := self._message()):
            self._events.append(message)
        if error := message.get("error"):
            raise QmpError(command, error["class"], error["desc"])
        return message["return"]

    def event(self, job: str, *names: str) -> Mapping[str, Any]:
        """Wait for an event of a job with one of the names, and return its data.

        Waits for as long as the job makes progress. Raises QmpError, SystemFailure, Timeout.
        """
        offset = self._offset(job)
        while True:
            for event in self._events:
                if event["event"] in names and event["data"].get("device") == job:
                    return dict(event["data"])
            self._events.clear()
            try:
                self._events.append(self._message(_PROGRESS_TIMEOUT))
            except Timeout:
                before, offset = offset, self._offset(job)
                # The event may have come before the answer.
                if offset == before and not self._events:
                    raise Timeout(f"QEMU has written nothing for {_PROGRESS_TIMEOUT:g} s") from None

    def _offset(self, job: str) -> int:
        """Return the number of bytes that a job has processed, or -1 if it has ended."""
        jobs = self.execute("query-block-jobs")
        return next((each["offset"] for each in jobs if each["device"] == job), -1)

    def _message(self, timeout: float = _TIMEOUT) -> Mapping[str, Any]:
        deadline = time.monotonic() + timeout
        while b"\n" not in self._buffer:
            if not is_readable(self._output.fileno(), within=deadline - time.monotonic()):
                raise Timeout(f"QEMU has not answered for {timeout:g} s")
            data = os.read(self._output.fileno(), 65536)
            if not data:
                self._process.kill()
                said = self._process.stderr.read().decode(errors="replace") if self._process.stderr else ""
                raise SystemFailure(f"QEMU cannot open the images ({said.strip()})", errno.EIO)
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        return dict(json.loads(line))
