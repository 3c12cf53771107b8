# SPDX-License-Identifier: LGPL-2.1-or-later
"""Collect output that no manager has read: from the pipe, and from QEMU's log of the console."""

from __future__ import annotations

import fcntl
import os
from typing import Protocol

#: Ends what was read late if some of it is not there.
MISSING = b"\r\n[vmspawn: what the guest printed next, while it had no manager, is missing]\r\n"

#: Ends it where nothing was kept.
NOT_KEPT = b"\r\n[vmspawn: what the guest printed here, while it had no manager, was not kept]\r\n"

_RECEIVE_SIZE = 65536

# What is written at once may not fit into the rest of a pipe.
_PAGE = 4096

# Attempts to find the guest silent for as long as it takes to look.
_ATTEMPTS = 16

# So many bytes are the same by no accident.
_SURE = 64


class Log(Protocol):
    """What QEMU logs of the console; it holds all that came since it was emptied, up to a bound."""

    @property
    def size(self) -> int:
        """How many bytes are in it."""

    @property
    def is_full(self) -> bool:
        """Whether nothing more fits, so that something may be missing."""

    def read(self, size: int) -> bytes:
        """The first bytes of it."""

    def empty(self) -> None:
        """Forget what is in it."""

    def close(self) -> None:
        """Let go of it. May be called again."""


def take(source: int, log: Log | None, *, kept_in_pipe: bool = False) -> bytes:
    """Everything that has not been read, oldest first, from a pipe that has a reader again; the log is empty then.

    Without a log it is what QEMU kept in the pipe, if it did.
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
        pass  # empty, or QEMU has ended, which the next who reads will notice
    return taken


def join(piped: bytes, logged: bytes) -> bytes:
    """Put together what was in the pipe and what was logged.

    The log has all of it but for what had come just before it was emptied last, with which the pipe begins.
    """
    head = logged[:_SURE]
    start = piped.find(head) if len(head) == _SURE else -1
    if start < 0:
        longest = min(len(piped), len(logged))
        shared = next((n for n in range(min(longest, _SURE), 0, -1) if piped.endswith(logged[:n])), 0)
        # Where the log is short, the pipe may have all of it and the guest's next words.
        start = piped.rfind(logged) if 0 < len(logged) < _SURE and not shared else len(piped) - shared
        start = len(piped) if start < 0 else start
    return piped[:start] + logged
