# SPDX-License-Identifier: LGPL-2.1-or-later
"""Spells the fields in errors as command-line options: `machine_type` as `--machine-type=`."""

from __future__ import annotations

from typing import Any

#: Fields whose options have other names. A name in capitals is a positional argument.
_OF_VMSPAWN = {
    "name": "machine",
    "ram_growth": "ram",
    "extra_disks": "extra-drive",
    "console_log": "log",
    "qemu_arguments": "qemu-arg",
    "vendor_strings": "smbios11",
    "network_user": "network-user-mode",
    "forwards": "forward",
    "binds": "bind",
    "volumes": "bind-volume",
    "credentials": "set-credential",
    "firmware.kind": "firmware",
    "firmware.include": "firmware-features",
    "firmware.nvram_template": "efi-nvram-template",
    "firmware.nvram_state": "efi-nvram-state",
    "registration.mode": "register",
    "registration.slice": "slice",
    "registration.properties": "property",
    "registration.keep_unit": "keep-unit",
}
_OF_VMCTL = {
    "name": "NEW",
    "thread": "iothread",
    "size": "SIZE",
    "network_user": "network-user-mode",
    "forwards": "FORWARD",
    "skip_special": "skip-special",
}
#: Fields whose values are separate options: --system, --user.
_NAMED_BY_VALUE = {"registration.scope"}

_NAMES = {"vmspawn": _OF_VMSPAWN, "vmctl": _OF_VMCTL}


def as_option(program: str, field: str, value: Any = None) -> str:
    """Spell a field as an option of `program`: `--cpus=500`, `--cpus=` for its name alone, `--ephemeral` for True."""
    if field in _NAMED_BY_VALUE:
        return f"--{value or 'system'}"
    name = _NAMES.get(program, {}).get(field, field.replace("_", "-"))
    if name.isupper():
        return name if value is None else f"{name} {value}"
    if value is True:
        return f"--{name}"
    return f"--{name}={_text(value)}"


def _text(value: Any) -> str:
    if value is None:
        return ""
    return "no" if value is False else str(value)
