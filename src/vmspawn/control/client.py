# SPDX-License-Identifier: LGPL-2.1-or-later
"""Connects to machines by name, with blocking calls, for short-lived commands that must start fast."""

from __future__ import annotations

import os
import socket
from errno import EIO

from ..aio import sockets
from ..errors import NotConnected, SystemFailure, Timeout
from ..host import machined, runtime, varlink
from ..host.varlink import VarlinkError

__all__ = ["REPLY_TIMEOUT", "Client", "VarlinkError", "connect"]

#: Seconds within which a machine must reply, as in sd-varlink's clients.
REPLY_TIMEOUT = 45.0


#: The beginnings of methods that change nothing.
_READING = ("Acquire", "Describe", "List", "Subscribe", "Wait")


class Client(varlink.Client):
    """A connection to a machine's control socket."""

    def __init__(self, machine: str, *, timeout: float = REPLY_TIMEOUT) -> None:
        """Connect to a machine. Raises the errors of `connect`."""
        super().__init__(connect(machine, runtime.CONTROL, timeout=timeout), f"machine {machine}", timeout=timeout)
        self.machine = machine

    def _late(self, method: str) -> Timeout:
        error = super()._late(method)
        if not error.hint:
            pid = runtime.running_qemu(os.path.join(runtime.runtime_root(), self.machine))
            if trouble := runtime.process_trouble(pid):
                error.hint = f"QEMU (process {pid}) {trouble}"
        if not method.rpartition(".")[2].startswith(_READING):
            error.hint = "; ".join(filter(None, (error.hint, "the request may still take effect")))
        return error


def connect(machine: str, name: str, *, timeout: float = REPLY_TIMEOUT) -> socket.socket:
    """Connect to the socket `name` in a machine's runtime directory. The caller owns the connected socket.

    The socket is addressed through a descriptor of the directory, because a path may be too long for a socket address.
    Raises NotConnected if the machine does not run, Timeout if its manager accepts no connection, and SystemFailure if
    the directory cannot be read.
    """
    runtime.check_name(machine)
    try:
        folder = os.open(os.path.join(runtime.runtime_root(), machine), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        # systemd-vmspawn, and a vmspawn with another runtime directory, have their sockets elsewhere.
        if path := machined.machines().get(machine):
            if name != runtime.CONTROL:
                path = os.path.join(os.path.dirname(path), name)
            return _connect_to(path, machine, timeout)
        raise NotConnected(f"there is no machine named {machine}", hint="see: vmctl list") from None
    except OSError as error:
        raise SystemFailure(f"cannot reach machine {machine}", error.errno or EIO) from None
    try:
        return _connect_to(f"/proc/self/fd/{folder}/{name}", machine, timeout)
    except NotConnected:
        pid = runtime.running_qemu(f"/proc/self/fd/{folder}")
        if not pid or name != runtime.CONTROL:
            raise
        if holder := runtime.lock_holder(f"/proc/self/fd/{folder}"):
            raise NotConnected(
                f"machine {machine} is run by process {holder}, which serves no control socket",
                hint="the manager is still adopting the machine, or its program passed control=False",
            ) from None
        raise NotConnected(
            f"machine {machine} runs without a manager (QEMU is process {pid})",
            hint=f"adopt it with: vmctl adopt {machine}",
        ) from None
    finally:
        os.close(folder)


def _connect_to(path: str, machine: str, timeout: float) -> socket.socket:
    try:
        return sockets.connect(path, timeout=timeout)
    except (FileNotFoundError, ConnectionRefusedError):
        raise NotConnected(f"machine {machine} does not run", hint="see: vmctl list") from None
    except TimeoutError as error:
        raise Timeout(f"machine {machine} {error.strerror}") from None
    except OSError as error:
        raise SystemFailure(f"cannot reach machine {machine}", error.errno or EIO) from None
