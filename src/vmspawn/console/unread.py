# SPDX-License-Identifier: LGPL-2.1-or-later
"""Collects the console output that no manager has read, from the pipe and from QEMU's log of the console."""

from __future__ import annotations

import fcntl
import os
from typing import Protocol

#: Marks the place where output is missing.
MISSING = b"\r\n[vmspawn: output is missing here: the guest printed more than is kept without a manager]\r\n"

#: Marks the place where all output is missing.
NOT_KEPT = b"\r\n[vmspawn: output is missing here: it is not kept without a manager]\r\n"

_RECEIVE_SIZE = 65536

# A full pipe may have this much room left, because a write is not split.
_PAGE = 4096

# Attempts to read the pipe and the log without new output in between.
_ATTEMPTS = 16

# This many equal bytes are the same output, not a coincidence.
_SURE = 64


class Log(Protocol):
    """QEMU's log of the console: the output since the log was emptied, up to a bound."""

    @property
    def size(self) -> int:
        """Return the number of bytes in the log."""

    @property
    def is_full(self) -> bool:
        """Return whether the log is full, so that output may be missing."""

    def read(self, size: int) -> bytes:
        """Return the first bytes of the log."""

    def empty(self) -> None:
        """Discard the bytes in the log."""

    def close(self) -> None:
        """Close the log. May be called again."""


def take(source: int, log: Log | None, *, kept_in_pipe: bool = False) -> bytes:
    """Remove all unread output from the pipe and the log, and return it, oldest first.

    `kept_in_pipe` is True if there is no log because QEMU kept the output in the pipe.
    """
    if log is None:
        piped = _drain(source)
        if not kept_in_pipe:
            return piped + NOT_KEPT
        return piped + (MISSING if len(piped) > fcntl.fcntl(source, fcntl.F_GETPIPE_SZ) - _PAGE else b"")
    piped = b""
    size = log.size
    for _ in range(_ATTEMPTS):
        piped += _drain(source)
        before, size = size, log.size
        if before == size:
            break
    logged, missing = log.read(size), log.is_full
    log.empty()
    return join(piped, logged) + (MISSING if missing else b"")


def _drain(source: int) -> bytes:
    taken = b""
    try:
        while data := os.read(source, _RECEIVE_SIZE):
            taken += data
    except OSError:
        pass  # the pipe is empty, or QEMU has ended, which the next read reports
    return taken


def join(piped: bytes, logged: bytes) -> bytes:
    """Join the output from the pipe and from the log.

    The log has all output since it was last emptied. The pipe may begin with older output that is not in the log.
    """
    head = logged[:_SURE]
    start = piped.find(head) if len(head) == _SURE else -1
    if start < 0:
        longest = min(len(piped), len(logged))
        shared = next((n for n in range(min(longest, _SURE), 0, -1) if piped.endswith(logged[:n])), 0)
        # If the log is short, the pipe may have all of the log, and newer output after it.
        start = piped.rfind(logged) if 0 < len(logged) < _SURE and not shared else len(piped) - shared
        start = len(piped) if start < 0 else start
    return piped[:start] + logged
