# SPDX-License-Identifier: LGPL-2.1-or-later
"""Opens the file with a machine's UEFI variables: beside the image, at a path that the user names, or in memory."""

from __future__ import annotations

import os
import stat

from ..errors import StartError
from .firmware import Blob, FirmwareWish

SUFFIX = ".efinvramstate"

_COPY_SIZE = 1 << 20


def state_path(wish: FirmwareWish, image: str | None, *, ephemeral: bool) -> str | None:
    """Return the path of the file for the variables, or None if they are discarded with the machine.

    `image` is the image or directory that boots. By default, the variables of a block device are discarded.
    """
    if wish.nvram_state == "off":
        return None
    if wish.nvram_state != "auto":
        return os.path.abspath(wish.nvram_state)
    if image is None or ephemeral or _is_device(image):
        return None
    return image.rstrip("/") + SUFFIX


def _is_device(path: str) -> bool:
    try:
        return stat.S_ISBLK(os.stat(path).st_mode)
    except OSError:
        return False


def open_state(path: str | None, template: Blob) -> int:
    """Open the variables for reading and writing; a new file is a copy of the template. The caller owns the descriptor.

    Raises StartError.
    """
    if path is None:
        fd = os.memfd_create("vmspawn-nvram", os.MFD_CLOEXEC)
        try:
            _copy(template, fd)
        except BaseException:
            os.close(fd)
            raise
        return fd
    hint = "name another file, or use {firmware.nvram_state=off}"
    try:
        # O_NONBLOCK, so that opening a FIFO does not wait. It has no effect on regular files.
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        return _create(path, template, hint)
    except OSError as error:
        raise StartError.with_fields(
            "cannot open the UEFI variables {path}: {reason}", hint=hint, path=path, reason=error.strerror
        ) from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise StartError.with_fields("the UEFI variables {path} are not a regular file", hint=hint, path=path)
    return fd


def _create(path: str, template: Blob, hint: str) -> int:
    """Create the file. It gets its name only when it is complete, so that no later start uses a partial copy."""
    partial = f"{path}.{os.getpid()}"
    try:
        fd = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StartError.with_fields(
            "cannot create the UEFI variables {path}: {reason}", hint=hint, path=path, reason=error.strerror
        ) from None
    try:
        _copy(template, fd)
        os.fsync(fd)
        os.rename(partial, path)
    except BaseException:
        os.close(fd)
        os.unlink(partial)
        raise
    return fd


def _copy(template: Blob, target: int) -> None:
    try:
        with open(template.path, "rb") as source:
            while data := source.read(_COPY_SIZE):
                # A short write precedes the error of a full disk.
                rest = memoryview(data)
                while rest:
                    rest = rest[os.write(target, rest) :]
    except OSError as error:
        raise StartError(f"cannot copy the UEFI variables' template {template.path}: {error.strerror}") from None
