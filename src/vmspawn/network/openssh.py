# SPDX-License-Identifier: LGPL-2.1-or-later
"""Writes the settings with which OpenSSH reaches a guest, in the form of ssh_config(5)."""

from __future__ import annotations

import os
from collections.abc import Iterable

from ..host import runtime
from ..record import Record
from .forward import Forward, is_ssh, local_address


class Access(Record):
    """The forwarded port of this host that leads to a guest's SSH server, and the machine's key."""

    machine: str
    address: str
    port: int
    private_key: str
    known_hosts: str

    @property
    def host(self) -> str:
        """The guest's name for ssh."""
        return f"vmspawn/{self.machine}"

    @property
    def alias(self) -> str:
        """The guest's name for programs that read a name with a slash as a path, such as scp and rsync."""
        return f"vmspawn-{self.machine}"

    def settings(self, user: str = "root") -> dict[str, str]:
        """Return ssh's settings. Values are quoted as in a configuration file.

        The guest's host key is pinned at its first use, for as long as the machine runs. The settings turn off what the
        user's own configuration may set for all hosts: a proxy, which cannot reach an address of this host, and the
        forwarding of the user's agent and display to the guest.
        """
        return {
            "HostName": self.address,
            "Port": str(self.port),
            "User": _quoted(user),
            "IdentityFile": _quoted(self.private_key.replace("%", "%%")),
            "IdentitiesOnly": "yes",
            "HostKeyAlias": self.host,
            "UserKnownHostsFile": _quoted(self.known_hosts.replace("%", "%%")),
            "StrictHostKeyChecking": "accept-new",
            # Otherwise the guest may add keys to the file, and ssh leaves a copy of the previous file beside it.
            "UpdateHostKeys": "no",
            "CheckHostIP": "no",
            "ProxyCommand": "none",
            "ForwardAgent": "no",
            "ForwardX11": "no",
        }

    def configuration(self) -> str:
        """Return the block of a configuration file."""
        lines = [f"Host {self.host} {self.alias}", *(f"    {key} {value}" for key, value in self.settings().items())]
        return "\n".join(lines) + "\n"

    def options(self, user: str) -> list[str]:
        """Return ssh's arguments up to the guest's name; a command may follow."""
        options = [part for key, value in self.settings(user).items() for part in ("-o", f"{key}={value}")]
        return [*options, self.host]


def key_of(machine: str) -> str:
    """Return the path of a machine's private key, or an empty string if the machine has none."""
    path = os.path.join(_directory(machine), runtime.SSH_KEY)
    return path if os.path.exists(path) else ""


def access_of(machine: str, forwards: Iterable[Forward], key: str) -> Access | None:
    """Return the access to a machine that has a key, or None if no forward leads to the guest's SSH server."""
    found = next(filter(is_ssh, forwards), None)
    if found is None:
        return None
    known_hosts = os.path.join(_directory(machine), runtime.SSH_KNOWN_HOSTS)
    return Access(machine, local_address(found), found.port, key, known_hosts)


def _directory(machine: str) -> str:
    return os.path.abspath(os.path.join(runtime.runtime_root(), machine))


def _quoted(text: str) -> str:
    """Quote a value. In quotes, a backslash is an escape for ssh only before a quote or another backslash."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
