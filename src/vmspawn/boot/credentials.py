# SPDX-License-Identifier: LGPL-2.1-or-later
"""Loads credentials, which systemd in the guest passes to its services (systemd.exec(5), CREDENTIALS)."""

from __future__ import annotations

import os
import socket
import stat

from ..errors import StartError, UsageError
from ..record import Record

#: systemd's CREDENTIALS_TOTAL_SIZE_MAX.
TOTAL_MAX = 1 << 20

#: Seconds without a byte after which reading a credential from a socket fails.
_SOCKET_TIMEOUT = 30.0


class Credential(Record):
    """A credential for systemd in the guest.

        vmspawn.Machine(image="debian.raw", credentials=[Credential("passwd.plaintext-password.root", b"secret")])

    It has a value, or the path of a file or socket that the value is read from when the machine starts.
    """

    name: str
    value: bytes = b""
    path: str | None = None


def check(credentials: tuple[Credential, ...]) -> None:
    """Raise UsageError if two credentials have the same name."""
    names = [each.name for each in credentials]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"there are two credentials named {name}", hint="leave out one of them")


def load(credential: Credential) -> bytes:
    """Return a credential's value; a path is read as a file or an AF_UNIX stream socket. Raises StartError."""
    if credential.path is None:
        return credential.value
    try:
        if stat.S_ISSOCK(os.stat(credential.path).st_mode):
            value = _read_socket(credential.path)
        else:
            with open(credential.path, "rb") as file:
                value = file.read(TOTAL_MAX + 1)
    except OSError as error:
        reason = error.strerror or f"it sent nothing more for {_SOCKET_TIMEOUT:g} s"
        raise StartError(f"cannot load the credential {credential.name} from {credential.path}: {reason}") from None
    if len(value) > TOTAL_MAX:
        raise StartError(f"the credential {credential.name} is larger than {TOTAL_MAX >> 20} MiB")
    return value


def _read_socket(path: str) -> bytes:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(_SOCKET_TIMEOUT)
        connection.connect(path)
        value = bytearray()
        while len(value) <= TOTAL_MAX and (data := connection.recv(65536)):
            value += data
        return bytes(value)
