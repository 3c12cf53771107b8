# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests the file with the guest's memory."""

import os
from contextlib import ExitStack

import pytest

from tests.spawn_config import parse_config
from vmspawn.boot import memory
from vmspawn.boot.config import MachineConfig, check_config
from vmspawn.boot.extras import Owned
from vmspawn.errors import StartError, UsageError


def test_the_file_has_no_name_and_takes_no_room_until_it_is_written() -> None:
    with ExitStack() as lent, ExitStack() as undo:
        extras = memory.in_file(64 << 20, Owned(undo, lent))
        (fd,) = extras.descriptors
        assert f"mem-path=/proc/self/fd/{fd},share=on" in extras.arguments[1]
        found = os.fstat(fd)
        assert (found.st_nlink, found.st_blocks) == (0, 0)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_memory_that_does_not_fit_is_refused() -> None:
    with ExitStack() as stack, pytest.raises(StartError, match=r"needs .* MiB in /dev/shm, and .* MiB are free"):
        memory.in_file(1 << 60, Owned(stack, stack))


def test_memory_is_anonymous_unless_a_file_is_requested() -> None:
    assert parse_config(["--guest=builtin"]).ram_backing == "anonymous"
    assert parse_config(["--guest=builtin", "--ram-backing=file"]).ram_backing == "file"
    with pytest.raises(UsageError, match="ram_backing='swap' is not known"):
        check_config(MachineConfig(guest="builtin", ram_backing="swap"))
