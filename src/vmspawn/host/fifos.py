# SPDX-License-Identifier: LGPL-2.1-or-later
"""Connects QEMU's console with its manager through two named pipes in the runtime directory.

QEMU writes a serial port's output byte by byte. A socket is full after a few hundred separate bytes; a
pipe joins them and has room for 64 kB. The pipes have names, so that another manager can open them.
"""

from __future__ import annotations

import contextlib
import fcntl
import os

from ..record import Record
from .runtime import QEMU_INPUT, QEMU_OUTPUT, MachineDirectory


class ConsolePipes(Record):
    """The descriptors of both pipes. The holder owns all four."""

    #: The manager's non-blocking ends: for typed input, and for output.
    typed: int
    shown: int
    #: QEMU's standard input and output.
    qemu_input: int
    qemu_output: int


def make(directory: MachineDirectory, *, capacity: int = 0) -> ConsolePipes:
    """Make and open the pipes; `capacity` is the size of the output pipe in bytes, 0 for the default. Raises OSError.

    QEMU also has its input open for writing, so it never reads an end of file, and survives its manager. Without a
    manager, QEMU drops its output. A `capacity` is for a device that drops output when the pipe is full. With a
    `capacity`, QEMU also has its output open for reading, so that the pipe keeps this output for the next manager.
    """
    taken: list[int] = []
    flags = os.O_NONBLOCK | os.O_CLOEXEC
    try:
        names = [directory.socket_address(name) for name in (QEMU_INPUT, QEMU_OUTPUT)]
        for name in names:
            os.mkfifo(name, 0o600)
        taken.append(os.open(names[0], os.O_RDWR | flags))
        taken.append(os.open(names[0], os.O_WRONLY | flags))
        taken.append(os.open(names[1], os.O_RDONLY | flags))
        taken.append(os.open(names[1], (os.O_RDWR if capacity else os.O_WRONLY) | flags))
    except BaseException:
        for fd in taken:
            os.close(fd)
        raise
    qemu_input, typed, shown, qemu_output = taken
    if capacity:
        with contextlib.suppress(OSError):
            fcntl.fcntl(shown, fcntl.F_SETPIPE_SZ, capacity)
    return ConsolePipes(typed, shown, qemu_input, qemu_output)


def open_again(directory: MachineDirectory) -> tuple[int, int]:
    """Open the manager's ends of the pipes of a QEMU that another manager started: for input and for output.

    The caller owns both. Raises OSError.
    """
    flags = os.O_NONBLOCK | os.O_CLOEXEC
    typed = os.open(directory.socket_address(QEMU_INPUT), os.O_WRONLY | flags)
    try:
        return typed, os.open(directory.socket_address(QEMU_OUTPUT), os.O_RDONLY | flags)
    except BaseException:
        os.close(typed)
        raise
