# SPDX-License-Identifier: LGPL-2.1-or-later
"""Volumes of systemd's storage providers (storagectl(1)): how they are written, and how they are had.

A provider is a Varlink service that hands out descriptors of files and block devices by name.
"""

import os
from typing import Any, NamedTuple

from ..errors import NotConnected, UsageError, VolumeError

_INTERFACE = "io.systemd.StorageProvider"

SYNTAX = "PROVIDER:VOLUME[:CONFIG][:KEY=VALUE,…]"

_CREATE_MODES = ("any", "new", "open")
_REQUESTS = ("blk", "reg")

#: The providers' errors in words, and what to do.
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


class Volume(NamedTuple):
    """A volume as the user asks for it. `config` is the bus, empty for the default; `parameters` are Acquire's."""

    provider: str
    name: str
    config: str
    parameters: dict[str, Any]

    @property
    def disk_name(self) -> str:
        """What the disk is called, here and by machinectl."""
        return f"{self.provider}:{self.name}"


def parse(option: str, text: str, parse_size: Any, parse_boolean: Any) -> Volume:
    """Parse `PROVIDER:VOLUME[:CONFIG][:KEY=VALUE,…]`. Raises UsageError.

    `parse_size(text, option=…)` and `parse_boolean(option, text, auto=True)` are how the commands read those.
    """
    parts = text.split(":", 3)
    provider, name, *rest = (*parts, "") if len(parts) == 1 else parts
    if not provider or not name or "/" in provider or provider.startswith("."):
        raise UsageError(f"{option}{text} names no volume", hint=f"write {option}{SYNTAX}")
    settings = rest.pop() if rest and "=" in rest[-1] else ""
    config = rest[0] if rest else ""
    if len(rest) > 1 or "=" in config:
        raise UsageError(f"{option}{text} has too many parts", hint=f"write {option}{SYNTAX}")
    parameters: dict[str, Any] = {}
    for setting in filter(None, settings.split(",")):
        key, _, value = setting.partition("=")
        parameters.update(_parameter(option, key, value, parse_size, parse_boolean))
    return Volume(provider, name, config, parameters)


def _parameter(option: str, key: str, value: str, parse_size: Any, parse_boolean: Any) -> dict[str, Any]:
    match key:
        case "template":
            return {"template": value}
        case "create":
            return {"createMode": _choice(f"{option}…create=", value, _CREATE_MODES)}
        case "request-as":
            return {"requestAs": _choice(f"{option}…request-as=", value, _REQUESTS)}
        case "size" | "create-size":
            return {"createSizeBytes": parse_size(value, option=f"{option}…{key}=")}
        case "read-only" | "ro":
            choice = parse_boolean(f"{option}…{key}=", value, auto=True)
            return {} if choice == "auto" else {"readOnly": choice == "yes"}
    raise UsageError(f"{option} knows no {key}=", hint="there are: create=, size=, template=, read-only=, request-as=")


def _choice(option: str, value: str, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise UsageError(f"{option}{value} is not known", hint=f"there are: {', '.join(choices)}")
    return value


def acquire(volume: Volume, *, user: bool, read_only: bool) -> int:
    """Open a volume, or create it, and return its descriptor, which the caller owns.

    `read_only` is for a bus that writes nothing. Raises VmspawnError.
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
            return service.take_descriptor(int(reply["fileDescriptorIndex"]))
    except NotConnected:
        raise VolumeError(
            f"{failure}: there is no storage provider {volume.provider}", hint="see: storagectl providers"
        ) from None
    except VarlinkError as error:
        reason, hint = _EXPLAINED.get(error.leaf, (str(error), ""))
        raise VolumeError(f"{failure}: {reason}", hint=hint) from None


def _socket_path(provider: str, *, user: bool) -> str:
    """Where a provider listens. Raises UsageError where a user has no runtime directory."""
    base = os.environ.get("XDG_RUNTIME_DIR") if user else "/run"
    if not base:
        raise UsageError.with_fields(
            "no storage providers: XDG_RUNTIME_DIR is not set",
            hint="use those of the system with {registration.scope=system}",
        )
    return os.path.join(base, "systemd", _INTERFACE, provider)
