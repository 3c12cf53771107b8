# SPDX-License-Identifier: LGPL-2.1-or-later
"""Ends a machine when the program that started it has died, and removes the machine's files.

vmspawn runs this file by its path and without the package, so that the process stays small. This process, the watcher,
has its own session, waits for the end of a process that the machine must not outlive, and then kills QEMU and its
helpers. `Started.end` ends the watcher of a machine that ends before its program.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import sys
import time
from typing import Any

#: Seconds within which a killed process must end, and a living program must remove the directory.
_END_TIMEOUT = 10.0

#: Seconds to wait for the lock of a dead program.
_LOCK_TIMEOUT = 2.0

#: Seconds after which QEMU is looked for again, because the program may have died while it started QEMU.
_STARTING = 0.3

_LOG = "qemu.log"
_STATE = "state.json"
_ENDED = "ended"


def command(path: str, files: tuple[str, ...], processes: tuple[int, ...]) -> list[str]:
    """Return the command line of a machine's watcher.

    `path` is the machine's directory, and `files` are the names of the files that the watcher removes from it.
    """
    watched = [f"{pid}:{_start_time(pid)}" for pid in processes]
    # The watcher finds QEMU by the real path of its log, and changes its own working directory.
    real = os.path.realpath(path)
    return [sys.executable, "-I", "-S", os.path.abspath(__file__), real, ",".join(files), *watched]


def _main(path: str, files: str, *processes: str) -> None:
    os.chdir("/")
    watched = [_open(process) for process in processes]
    inode = _read_inode(watched[0])
    if not inode:
        # A program that lives has failed to make the directory, and ends its watcher.
        if watched[0] < 0 or select.select([watched[0]], [], [], _END_TIMEOUT)[0]:
            _remove_unused(path, files.split(","))
        return
    if all(fd >= 0 for fd in watched):
        poll = select.poll()
        for fd in watched:
            poll.register(fd, select.POLLIN)
        poll.poll()
    if watched[0] >= 0 and not select.select([watched[0]], [], [], 0)[0]:
        # The program lives, and cleans up after QEMU's end.
        _record(path, inode, "parent-ended")
        _kill_all(path)
        select.select([watched[0]], [], [], _END_TIMEOUT)
    lock = _lock(path)
    if _inode(path) != inode:
        return  # the directory was removed, or belongs to another machine
    _record(path, inode, "program-ended")
    _kill_all(path)
    if lock >= 0:
        time.sleep(_STARTING)
        _kill_all(path)
    else:
        _wait_for_manager(path, inode)
    _remove(path, files.split(","))


def _record(path: str, inode: int, reason: str) -> None:
    """Write the reason for the machine's end, which the manager reads after QEMU's end. Keeps an earlier reason."""
    with contextlib.suppress(OSError):
        directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        if os.fstat(directory).st_ino == inode:
            file = os.open(_ENDED, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=directory)
            os.write(file, reason.encode())
            os.close(file)
        os.close(directory)


def _read_inode(program: int) -> int:
    """Wait until the program has made the machine's directory. Returns its inode, or 0 if the program has died.

    The program writes the inode to standard input. A forked child of the program may hold the pipe open.
    """
    readable, _, _ = select.select([0, program], [], []) if program >= 0 else select.select([0], [], [], 0)
    return int(os.read(0, 32) or 0) if 0 in readable else 0


def _remove_unused(path: str, files: list[str]) -> None:
    """Remove a directory that the program may have made before it died. No QEMU was started in it then.

    Leaves the directory if another machine uses it: a machine whose manager has died has no lock, but a QEMU.
    """
    lock = _lock(path)
    if lock >= 0 and os.fstat(lock).st_ino == _inode(path) and not (_qemus(path) or _saved_qemu(path)):
        _remove(path, files)


def _open(process: str) -> int:
    """Return a pidfd of a process, given by its id and its start time, or -1 if it has ended."""
    pid, started = map(int, process.split(":"))
    try:
        fd = os.pidfd_open(pid)
    except OSError:
        return -1
    return fd if _start_time(pid) == started else -1


def _start_time(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return int(file.read().rpartition(b")")[2].split()[19])
    except OSError:
        return 0


def _kill_all(path: str) -> None:
    """Kill QEMU and the helpers in the machine's state."""
    for pid in (*_qemus(path), *_helpers(path)):
        _kill(pid)


def _qemus(path: str) -> list[int]:
    """Return the process ids of the QEMUs in a directory, which are found by their log file."""
    log = os.path.join(path, _LOG)
    return [int(name) for name in os.listdir("/proc") if name.isdigit() and _errors_of(name) == log]


def _errors_of(pid: str) -> str:
    try:
        return os.readlink(f"/proc/{pid}/fd/2")
    except OSError:
        return ""


def _helpers(path: str) -> list[int]:
    """Return the process ids of the living helpers in the machine's state."""
    try:
        found = [(int(pid), int(started)) for _name, _what, pid, started in _state(path)["helpers"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [pid for pid, started in found if _lives(pid, started)]


def _saved_qemu(path: str) -> int:
    """Return the process id of QEMU in the machine's state if it lives, else 0. Its log may not be visible here."""
    try:
        qemu = _state(path)["qemu"]
        pid, started = int(qemu["pid"]), int(qemu["started"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0
    return pid if _lives(pid, started) else 0


def _lives(pid: int, started: int) -> bool:
    return pid > 0 and _start_time(pid) == started


def _state(path: str) -> dict[str, Any]:
    import json

    with open(os.path.join(path, _STATE), "rb") as file:
        return dict(json.load(file))


def _kill(pid: int) -> None:
    try:
        process = os.pidfd_open(pid)
        signal.pidfd_send_signal(process, signal.SIGKILL)
    except OSError:
        return
    select.select([process], [], [], _END_TIMEOUT)
    os.close(process)


def _inode(path: str) -> int:
    try:
        return os.stat(path).st_ino
    except OSError:
        return 0


def _lock(path: str) -> int:
    """Lock the directory, so that no other machine uses it meanwhile. Returns its descriptor, or -1.

    A forked child of the program may hold the lock as long as it lives.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return -1
    deadline = time.monotonic() + _LOCK_TIMEOUT
    while time.monotonic() < deadline:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return fd
        except OSError:
            time.sleep(0.02)
    return -1


def _wait_for_manager(path: str, inode: int) -> None:
    """Wait until a manager that has adopted the machine has removed the directory. It reads the reason there first."""
    deadline = time.monotonic() + _END_TIMEOUT
    while _inode(path) == inode and _start_time(_lock_holder(inode)) and time.monotonic() < deadline:
        time.sleep(0.02)


def _lock_holder(inode: int) -> int:
    """Return the process id of the process that has locked the directory, which may have ended, or 0.

    A child that holds the lock of its parent has another process id.
    """
    with contextlib.suppress(OSError), open("/proc/locks", "rb") as file:
        for lock in map(bytes.split, file):
            # A line is `1: FLOCK ADVISORY WRITE 1234 00:1b:5678 0 EOF`.
            if lock[1] == b"FLOCK" and lock[5].endswith(b":%d" % inode):
                return int(lock[4])
    return 0


def _remove(path: str, files: list[str]) -> None:
    for name in files:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(path, name))
    # Other files in the directory do not belong to vmspawn.
    with contextlib.suppress(OSError):
        os.rmdir(path)


if __name__ == "__main__":
    _main(*sys.argv[1:])
