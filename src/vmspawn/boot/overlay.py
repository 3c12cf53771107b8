# SPDX-License-Identifier: LGPL-2.1-or-later
"""An image that stays as it is: what the guest writes goes to an overlay without a name, which ends with the machine.

And images that grow before they boot.
"""

from __future__ import annotations

import errno
import json
import os

from ..errors import StartError, UsageError
from ..images import qcow2
from ..storage import backing as backings
from ..storage.backing import Backing
from .extras import Additions

#: The node of the image below its overlay.
BASE_NODE = "image-below"

#: As systemd-vmspawn, sizes are rounded up to whole pages.
_GROW_UNIT = 4096


def overlay(
    additions: Additions, base: Backing, image_format: str, *, path: str, folder: str, grow_to: int | None
) -> Backing:
    """A new qcow2 overlay over an image that is open for reading, in `folder` or, if that cannot be, in memory.

    Owns `base` from the call on; the caller owns what is returned. Raises StartError.
    """
    file = {"driver": "host_device" if base.block else "file", "filename": additions.add_fdset(base.fd)}
    node = {"driver": image_format, "node-name": BASE_NODE, "read-only": True, "file": {**file, "read-only": True}}
    if image_format == "qcow2":
        node["backing"] = None
    elif image_format != "raw":
        hint = "convert it with: qemu-img convert"
        raise UsageError(f"--ephemeral works with raw and qcow2 images, and {path} is {image_format}", hint=hint)
    size = qcow2.layout_of(base.fd, path).size if image_format == "qcow2" else base.size
    additions.arguments += ["-blockdev", json.dumps(node)]
    fd = _open_unnamed(folder)
    try:
        qcow2.write_empty(fd, max(size, _round_up(grow_to or 0)))
        return backings.inspect(fd, what="the overlay")
    except OSError as error:
        os.close(fd)
        raise StartError(f"cannot make an overlay for {path}: {error.strerror}") from None


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
    """Make a raw image file that is smaller than `size` that large; returns what it is then.

    A block device is as large as it is. Raises StartError, UsageError.
    """
    if image_format == "qcow2":
        raise UsageError(
            f"--grow-image= does not grow a qcow2 image, unless with --ephemeral: {path}",
            hint=f"grow it with: qemu-img resize {path} {size}",
        )
    size = _round_up(size)
    if backing.block or backing.size >= size or not backing.writable:
        return backing
    try:
        os.ftruncate(backing.fd, size)
        os.fsync(backing.fd)
    except OSError as error:
        raise StartError(f"cannot grow {path} to {size} bytes: {error.strerror}") from None
    return backing._replace(size=size)
