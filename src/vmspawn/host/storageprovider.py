# SPDX-License-Identifier: LGPL-2.1-or-later
"""Acquires volumes from systemd's storage providers (storagectl(1)).

A provider is a Varlink service that hands out descriptors of files and block devices by name.
"""

from __future__ import annotations

import os

from ..errors import NotConnected, ProtocolError, UsageError, VolumeError
from ..record import Record

_INTERFACE = "io.systemd.StorageProvider"

#: The providers' errors, each with a message and a hint.
_EXPLAINED = {
    "NoSuchVolume": ("there is no such volume", "add create=new or create=any, or see: storagectl"),
    "VolumeExists": ("the volume exists already", "leave out create=new"),
    "NoSuchTemplate": ("there is no such template", "see: storagectl templates"),
    "TypeNotSupported": ("the provider has no volumes of that type", "leave out request-as="),
    "WrongType": ("the volume is of another type", "leave out request-as=; directories cannot be disks"),
    "CreateNotSupported": ("the provider creates no volumes", "leave out create="),
    "CreateSizeRequired": ("a new volume needs a size", "add size=BYTES"),
    "ReadOnlyVolume": ("the volume is read-only", "add read-only=yes"),
    "BadTemplate": ("the template makes no disks", "see: storagectl templates"),
}


class Volume(Record):
    """A volume of one of systemd's storage providers, which is attached when the machine starts.

        vmspawn.Machine(guest="builtin", volumes=[Volume("fs", "data", "virtio-blk", {})])

    `config` is the bus, or empty for the default. `parameters` are arguments of the provider's method Acquire.
    """

    provider: str
    name: str
    config: str
    parameters: dict[str, object]

    @property
    def disk_name(self) -> str:
        """The disk's name, as in machinectl."""
        return f"{self.provider}:{self.name}"


def acquire(volume: Volume, *, user: bool, read_only: bool) -> int:
    """Open or create a volume, and return its descriptor. The caller owns the descriptor.

    `read_only` requests a read-only volume, unless `parameters` contain `readOnly`. Raises VmspawnError.
    """
    from .varlink import Client, VarlinkError

    parameters = {"name": volume.name, **volume.parameters}
    if read_only:
        parameters.setdefault("readOnly", True)
    failure = f"cannot get the volume {volume.disk_name}"
    try:
        with Client.of_service(_socket_path(volume.provider, user=user)) as service:
            reply = service.call(f"{_INTERFACE}.Acquire", parameters)
            if reply.get("type") == "dir":
                raise VolumeError(f"{failure}: it is a directory", hint="name a volume that is a file or a device")
            return service.take_descriptor(reply.get("fileDescriptorIndex"))
    except NotConnected:
        raise VolumeError(
            f"{failure}: there is no storage provider {volume.provider}", hint="see: storagectl providers"
        ) from None
    except VarlinkError as error:
        reason, hint = _EXPLAINED.get(error.leaf, (str(error), ""))
        raise VolumeError(f"{failure}: {reason}", hint=hint) from None
    except ProtocolError as error:
        raise VolumeError(f"{failure}: {error}", hint="see the log of the storage provider") from None


def _socket_path(provider: str, *, user: bool) -> str:
    """Return the path of a provider's socket. Raises UsageError for a user without a runtime directory."""
    base = os.environ.get("XDG_RUNTIME_DIR") if user else "/run"
    if not base:
        raise UsageError.with_fields(
            "no storage providers: XDG_RUNTIME_DIR is not set",
            hint="use the system's providers with {registration.scope=system}",
        )
    return os.path.join(base, "systemd", _INTERFACE, provider)
