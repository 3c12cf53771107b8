# SPDX-License-Identifier: LGPL-2.1-or-later
"""Opens disk images without blocking the event loop."""

from __future__ import annotations

from functools import partial

from ..aio.threads import open_in_thread
from ..storage.backing import Backing, open_disk


async def open_image(path: str, *, read_only: bool) -> Backing:
    """Open an image or block device with the program's permissions. The caller owns the Backing.

    Raises SystemFailure if it cannot be opened, or BadConfig if it cannot be a disk.
    """
    return await open_in_thread(partial(open_disk, path, read_only=read_only), Backing.close)
