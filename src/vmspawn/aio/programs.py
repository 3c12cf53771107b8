# SPDX-License-Identifier: LGPL-2.1-or-later
"""Runs a program until it exits, unless another thread cancels the work."""

from __future__ import annotations

import os
import subprocess
import threading
from contextvars import ContextVar


class Cancelled(Exception):
    """The work of this thread was cancelled."""


class Canceller:
    """Cancels the work of one thread: kills the program that the thread waits for, and makes `check` raise.

    The thread's context has the Canceller in the variable CANCELLER.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._is_cancelled = False

    def cancel(self) -> None:
        """Cancel the work. It may still complete."""
        with self._lock:
            self._is_cancelled = True
            if self._process is not None:
                self._process.kill()

    def check(self) -> None:
        """Raise Cancelled if the work was cancelled."""
        if self._is_cancelled:
            raise Cancelled

    def watch(self, process: subprocess.Popen[bytes] | None) -> None:
        """Kill this program when the work is cancelled. With None, stop watching."""
        with self._lock:
            self._process = process
            if process is not None and self._is_cancelled:
                process.kill()


CANCELLER: ContextVar[Canceller | None] = ContextVar("CANCELLER", default=None)


def check_cancelled() -> None:
    """Raise Cancelled if the work of this thread was cancelled."""
    if (canceller := CANCELLER.get()) is not None:
        canceller.check()


def run(
    command: list[str],
    *,
    timeout: float,
    feed: bytes = b"",
    directory: str | os.PathLike[str] | None = None,
    environment: dict[str, str] | None = None,
    inherited: tuple[int, ...] = (),
    output: int = subprocess.PIPE,
) -> subprocess.CompletedProcess[bytes]:
    """Run a program with `feed` on its standard input, and return its output and exit status.

    The program inherits the descriptors `inherited`. If `output` is a descriptor, the program writes its standard
    output there, and the result has no output.

    Raises OSError, subprocess.TimeoutExpired or Cancelled; the program has ended then.
    """
    canceller = CANCELLER.get() or Canceller()
    canceller.check()
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, cwd=directory, env=environment, stdin=pipe, stdout=output, stderr=pipe, pass_fds=inherited
    ) as process:
        canceller.watch(process)
        try:
            printed, errors = process.communicate(feed, timeout)
        except BaseException:
            process.kill()
            raise
        finally:
            canceller.watch(None)
    canceller.check()
    return subprocess.CompletedProcess(command, process.returncode, printed, errors)
