# SPDX-License-Identifier: LGPL-2.1-or-later
"""Implements the verb `adopt`, which starts a manager for a machine whose manager died."""

from __future__ import annotations

import argparse
import os
import select
import sys

from ...errors import NotConnected, StartError, Timeout
from ...host import runtime
from ...snapshots.background import failure
from .replies import reply_timeout, say
from .verbs import Verbs

#: Seconds within which the new manager must adopt the machine.
_ADOPT_TIMEOUT = 45.0


def add(verbs: Verbs) -> None:
    """Add the verb."""
    verbs.add_for_machine("adopt", _adopt, "start a manager for a machine whose manager died")


def _adopt(options: argparse.Namespace) -> None:
    """Start a manager in the background, and wait until it has adopted the machine."""
    name = runtime.check_name(options.machine)
    folder = os.path.join(runtime.runtime_root(), name)
    timeout = reply_timeout(options, _ADOPT_TIMEOUT)
    try:
        log = os.open(
            os.path.join(folder, runtime.MANAGER_LOG), os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600
        )
    except FileNotFoundError:
        raise NotConnected(f"there is no machine named {name}", hint="see: vmctl list") from None
    except OSError as error:
        raise StartError(f"cannot use the runtime directory {folder}: {error.strerror}") from None
    start = os.fstat(log).st_size
    reader, writer = os.pipe()
    try:
        pid = _start(name, log, writer)
        os.close(writer)
        writer = -1
        if not select.select([reader], [], [], timeout)[0]:
            raise Timeout(f"the new manager (process {pid}) has not adopted machine {name} within {timeout:g} s")
        if not os.read(reader, 1):
            os.waitpid(pid, 0)
            raise failure(os.pread(log, 1 << 16, start).decode(errors="replace"))
    finally:
        for fd in (log, reader, writer):
            if fd >= 0:
                os.close(fd)
    say(options, f"Adopted {name}")


def _start(name: str, log: int, ready_fd: int) -> int:
    """Start a manager that outlives vmctl, and return its process id. It inherits only `log` and `ready_fd`."""
    actions: list[tuple[object, ...]] = [
        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
        (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
        (os.POSIX_SPAWN_DUP2, log, 2),
        # Duplicating a descriptor onto itself makes it inheritable in the child alone.
        (os.POSIX_SPAWN_DUP2, ready_fd, ready_fd),
    ]
    arguments = ["--adopt", f"--machine={name}", "--console=headless", f"--ready-fd={ready_fd}"]
    command = [sys.executable, "-m", "vmspawn.cli.spawn", *arguments]
    return os.posix_spawn(sys.executable, command, os.environ, file_actions=actions, setsid=True)
