# SPDX-License-Identifier: LGPL-2.1-or-later
"""Puts an overlay on an image to keep the image unchanged, or grows an image before boot.

The guest writes to the overlay, a file without a name, which is discarded with the machine.
"""

from __future__ import annotations

import errno
import os

from ..errors import StartError, UsageError
from ..storage.backing import Backing, inspect_descriptor, set_direct, whole_sectors
from ..storage.image import FDSET_BASE

#: The node of the image below its overlay.
BASE_NODE = "image-below"

#: The descriptor set of that image. Disks have sets with larger numbers.
BASE_FDSET = FDSET_BASE - 1

#: Sizes are rounded up to whole pages, as in systemd-vmspawn.
_GROW_UNIT = 4096


class Below:
    """The image below an overlay: its read-only descriptor, and its block node."""

    __slots__ = ("fd", "node")

    def __init__(self, fd: int, node: dict[str, object]) -> None:
        self.fd = fd
        self.node = node

    def close(self) -> None:
        """Close the descriptor. May be called again."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def overlay(base: Backing, image_format: str, *, path: str, folder: str, grow_to: int | None) -> tuple[Backing, Below]:
    """Make a qcow2 overlay over an image that is open for reading, in `folder` or, if that is impossible, in memory.

    The caller owns both results, the second of which holds the descriptor of `base`; on failure the caller keeps
    `base`. Raises StartError, UsageError.
    """
    file = {"driver": "host_device" if base.is_block_device else "file", "filename": f"/dev/fdset/{BASE_FDSET}"}
    node = {"driver": image_format, "node-name": BASE_NODE, "read-only": True, "file": {**file, "read-only": True}}
    if image_format == "qcow2":
        node["backing"] = None
    elif image_format != "raw":
        hint = "convert it with: qemu-img convert"
        raise UsageError.with_fields(
            "{ephemeral=True} works with raw and qcow2 images, and {path} is {format}",
            hint=hint,
            path=path,
            format=image_format,
        )
    from ..images import qcow2

    size = qcow2.layout_of(base.fd, path).size if image_format == "qcow2" else whole_sectors(base.size)
    fd = _open_unnamed(folder)
    try:
        return empty_overlay(fd, max(size, _round_up(grow_to or 0))), Below(base.fd, node)
    except OSError as error:
        raise StartError(f"cannot make an overlay for {path}: {error.strerror}") from None


def empty_overlay(fd: int, size: int, *, is_direct: bool = False) -> Backing:
    """Write an empty qcow2 overlay of `size` bytes to an open file, and return its Backing.

    The Backing owns the descriptor, which is closed on failure. `is_direct` bypasses the page cache. Raises OSError.
    """
    from ..images import qcow2

    try:
        qcow2.write_empty(fd, size)
        backing = inspect_descriptor(fd, what="the overlay")
        set_direct(backing, is_direct, what="the overlay")
    except BaseException:
        os.close(fd)
        raise
    return backing


def _open_unnamed(folder: str) -> int:
    try:
        return os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
            raise StartError(f"cannot make an overlay in {folder}: {error.strerror}") from None
    return os.memfd_create("vmspawn-overlay", os.MFD_CLOEXEC)


def _round_up(size: int) -> int:
    return -(-size // _GROW_UNIT) * _GROW_UNIT


def grow(backing: Backing, image_format: str, size: int, *, path: str) -> Backing:
    """Grow a raw image file to `size` bytes, unless it is larger. Returns `backing` with its new size.

    Raises StartError, or UsageError for an image in another format and for a block device that is smaller.
    """
    if image_format != "raw":
        grow_it = "grow it with: qemu-img resize {path} {size}"
        raise UsageError.with_fields(
            "{grow_image=} does not grow a {format} image without {ephemeral=True}: {path}",
            hint=grow_it if image_format == "qcow2" else "convert it with: qemu-img convert",
            format=image_format,
            path=path,
            size=size,
        )
    if backing.is_block_device and backing.size < size:
        raise UsageError.with_fields(
            "{grow_image=} does not grow a block device without {ephemeral=True}: {path} has {size} bytes",
            hint="grow the device first",
            path=path,
            size=backing.size,
        )
    size = _round_up(size)
    if backing.is_block_device or backing.size >= size or not backing.is_writable:
        return backing
    try:
        os.ftruncate(backing.fd, size)
        os.fsync(backing.fd)
    except OSError as error:
        raise StartError(f"cannot grow {path} to {size} bytes: {error.strerror}") from None
    return backing._replace(size=size)
