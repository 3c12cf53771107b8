# SPDX-License-Identifier: LGPL-2.1-or-later
"""Starts processes that outlive the manager: QEMU and its helpers.

Each start imports this module, so it imports very little.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import signal
from collections.abc import Iterator

from ..errors import StartError

#: The termination signals. The command blocks them until its supervisor handles them.
END_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)

# The process gets these signals with their default actions.
_DEFAULT_SIGNALS = (signal.SIGPIPE, signal.SIGTSTP, signal.SIGUSR1, signal.SIGUSR2, *END_SIGNALS)

#: The environment variables that the process gets. None may contain secrets, or change the libraries that it loads.
ENVIRONMENT = ("PATH", "HOME", "LANG", "TMPDIR", "XDG_RUNTIME_DIR", "DISPLAY", "XAUTHORITY", "WAYLAND_DISPLAY")

#: Without this, QEMU's GTK would start a D-Bus session, and the sandbox would kill QEMU.
OVERRIDES = {"DBUS_SESSION_BUS_ADDRESS": "disabled:"}


def spawn(arguments: list[str], *, keep: list[int], log: int, streams: tuple[int, int] | None = None) -> int:
    """Start a program in a new session, with standard error in a log. Returns its process id.

    `streams` become standard input and output; the defaults are /dev/null and the log. The program inherits
    only `keep` besides them, under the same numbers. The caller keeps all descriptors. Raises StartError.
    """
    actions: list[tuple[object, ...]] = [
        (os.POSIX_SPAWN_DUP2, streams[0], 0) if streams else (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
        (os.POSIX_SPAWN_DUP2, streams[1] if streams else log, 1),
        (os.POSIX_SPAWN_DUP2, log, 2),
    ]
    # Duplicating a descriptor onto itself makes it inheritable in the child only.
    actions += [(os.POSIX_SPAWN_DUP2, fd, fd) for fd in keep]
    others = [fd for fd in _inheritable() if fd not in keep]
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    closable = [fd for fd in others if limit == resource.RLIM_INFINITY or fd < limit]
    actions += [(os.POSIX_SPAWN_CLOSE, fd) for fd in closable]
    environment = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
    environment |= OVERRIDES
    try:
        with _not_inherited([fd for fd in others if fd not in closable]):
            return os.posix_spawn(
                arguments[0],
                arguments,
                environment,
                file_actions=actions,
                setsid=True,
                setsigmask=[],
                setsigdef=_DEFAULT_SIGNALS,
            )
    except OSError as error:
        raise StartError(f"cannot run {arguments[0]}: {os.strerror(error.errno or errno.ENOEXEC)}") from None


@contextlib.contextmanager
def _not_inherited(descriptors: list[int]) -> Iterator[None]:
    """Make descriptors above a lowered limit not inheritable, because posix_spawn(3) cannot close them."""
    for fd in descriptors:
        os.set_inheritable(fd, False)
    try:
        yield
    finally:
        for fd in descriptors:
            os.set_inheritable(fd, True)


def _inheritable() -> list[int]:
    """Return the inheritable descriptors, except the standard streams."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            if (fd := int(name)) > 2 and os.get_inheritable(fd):
                found.append(fd)
        except OSError:
            pass  # the descriptor of this listing
    return found


def kill_child(pid: int) -> None:
    """Kill a child that still runs, and reap it. A child that was reaped already is left alone."""
    try:
        # A child that was not reaped keeps its number, so the number cannot belong to another process.
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
