# SPDX-License-Identifier: LGPL-2.1-or-later
"""Open disk images for a program, without blocking its event loop."""

from __future__ import annotations

from functools import partial

from ..aio.threads import open_in_thread
from ..storage.backing import Backing, open_disk


async def open_image(path: str, *, read_only: bool) -> Backing:
    """Open an image or block device as the program. The caller owns the Backing.

    Raises SystemFailure with the reason of the operating system, or BadConfig if it cannot be a disk.
    """
    return await open_in_thread(partial(open_disk, path, read_only=read_only), Backing.close)
