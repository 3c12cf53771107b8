# SPDX-License-Identifier: LGPL-2.1-or-later
"""Translates QEMU's errors about images into errors for users."""

from __future__ import annotations

import asyncio
import errno
from functools import partial
from typing import TypeVar

from ..errors import BadConfig, QmpError, SystemFailure, Timeout
from .holders import holder_of
from .image import Image

STORAGE_HINT = "the image's storage may hang; the operation completes when the storage answers"

#: Seconds to find the user of a file among the open files of all processes, some of which may be on storage that hangs.
_HOLDER_TIMEOUT = 5.0

_Error = TypeVar("_Error", bound=BaseException)


async def explain(error: _Error, name: str, image: Image | None, machine: str) -> _Error | SystemFailure | BadConfig:
    """Return a clearer error for a known error of QEMU, else `error`.

    `image` is the image that QEMU was to open for the disk `name` of `machine`.
    """
    if isinstance(error, Timeout) and not error.hint:
        error.hint = STORAGE_HINT
    if not isinstance(error, QmpError):
        return error
    if "multiple of request alignment" in error.description:
        return BadConfig(
            f"the size of {name} is not a multiple of the sectors that O_DIRECT needs ({error.description})",
            hint="use cache writeback, or give the image a size that is a multiple of 4096",
        )
    if "Failed to get" not in error.description or "lock" not in error.description:
        return error
    lock = "shared write" if "shared" in error.description else "write"
    identity = image.backing.identity if image is not None and image.backing is not None else ()
    holder = await _holder(identity, machine) if identity else ""
    return SystemFailure(
        f"{holder or 'another process'} uses the image of {name} (QEMU could not get its {lock} lock)",
        errno.EBUSY,
        hint="detach it there, attach it read-only in both places, or share it in both",
    )


async def _holder(identity: tuple[int, ...], machine: str) -> str:
    """Return the user of a file, or an empty string if it is not found in time."""
    work = asyncio.get_running_loop().run_in_executor(None, partial(holder_of, identity, ours=machine))
    try:
        async with asyncio.timeout(_HOLDER_TIMEOUT):
            return await work
    except TimeoutError:
        return ""
