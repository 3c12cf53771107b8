# SPDX-License-Identifier: LGPL-2.1-or-later
"""Reads data that is in the page cache, without waiting for the storage."""

from __future__ import annotations

import errno
import os

#: Linux has the flag since 4.14 (preadv2(2)); not every C library supports it.
_RWF_NOWAIT = getattr(os, "RWF_NOWAIT", None)


def read_cached(fd: int, length: int, offset: int) -> bytes:
    """Return `length` bytes of a file, as os.pread does. Raises OSError.

    Raises BlockingIOError if some of them are not in the page cache or are beyond the file's end, or if the file system
    cannot read without waiting. The caller then calls os.pread in a thread that may wait.
    """
    if _RWF_NOWAIT is None:
        raise BlockingIOError
    data = bytearray(length)
    try:
        count = os.preadv(fd, [data], offset, _RWF_NOWAIT)
    except NotImplementedError:
        raise BlockingIOError from None
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.EINVAL):
            raise BlockingIOError from None
        raise
    if count < length:
        raise BlockingIOError
    return bytes(data)
