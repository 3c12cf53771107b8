# SPDX-License-Identifier: LGPL-2.1-or-later
"""Passes strings to systemd, its stub and its boot loader in the guest, by SMBIOS type 11 (smbios-type-11(7))."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

from ..errors import StartError
from .config import MachineConfig
from .extras import Extras, Owned, content, join

#: The kernel's COMMAND_LINE_SIZE on x86; the kernel truncates a longer command line without an error.
KERNEL_ARGUMENTS_MAX = 2048

#: The maximum size of all strings in bytes. Firmware stores the table's length in 16 bits; QEMU 7.2 truncates and 11.1
#: drops a longer table without an error. The rest of the 64 KiB is for the table's other strings.
TOTAL_MAX = 60_000

#: The longest name of a fw_cfg file (QEMU's docs/specs/fw_cfg.rst), and the directory where systemd finds credentials.
_FW_CFG_NAME_MAX = 55
_FW_CFG_DIRECTORY = "opt/io.systemd.credentials/"

#: Guests of these architectures have SMBIOS with every firmware.
_BY_ITSELF = ("x86_64",)

_STUB = "io.systemd.stub.kernel-cmdline-extra"
_BOOT_LOADER = "io.systemd.boot.kernel-cmdline-extra"


def wishes(config: MachineConfig) -> list[str]:
    """Return the user's settings that are passed by SMBIOS, as fields of error templates."""
    fields = {
        "{credentials=}": config.credentials,
        "{vendor_strings=}": config.vendor_strings,
        "{binds=}": config.binds,
        "{pass_ssh_key=}": config.pass_ssh_key and config.cloud_init is None,
    }
    return [field for field, wish in fields.items() if wish]


def needs_uefi(config: MachineConfig, architecture: str) -> bool:
    """Return whether the user's settings need SMBIOS, and the architecture has SMBIOS only with UEFI."""
    return architecture not in _BY_ITSELF and bool(wishes(config))


def is_available_without_uefi(architecture: str) -> bool:
    """Return whether guests of an architecture have SMBIOS without UEFI."""
    return architecture in _BY_ITSELF


def of_kernel_arguments(arguments: Iterable[str]) -> list[bytes]:
    """Return the strings that pass kernel arguments to systemd-stub and systemd-boot in the image."""
    line = " ".join(arguments)
    if not line:
        return []
    return [os.fsencode(f"{name}={line}") for name in (_STUB, _BOOT_LOADER)]


def check_kernel_arguments(arguments: Iterable[str]) -> None:
    """Raise StartError if the kernel would truncate the arguments."""
    length = len(os.fsencode(" ".join(arguments)))
    if length >= KERNEL_ARGUMENTS_MAX:
        raise StartError(f"the kernel arguments are {length} bytes, and a kernel takes {KERNEL_ARGUMENTS_MAX - 1}")


def extras(strings: Sequence[bytes], credentials: Iterable[tuple[str, bytes]], owned: Owned) -> Extras:
    """Return QEMU's arguments for the strings, and for credentials by name.

    Both are passed as files in memory, so that ps(1) shows no credential. A credential that does not fit into the table
    is passed by fw_cfg, which systemd reads as well. Raises StartError for a credential that fits neither.
    """
    room = TOTAL_MAX - sum(map(len, strings))
    if room < 0:
        raise StartError.with_fields(
            "the SMBIOS strings are longer than {most} bytes", hint="use {credentials=} instead", most=TOTAL_MAX
        )
    table = list(strings)
    files = []
    for name, value in credentials:
        string = of_credential(name, value)
        if len(string) <= room:
            room -= len(string)
            table.append(string)
        else:
            files.append(_fw_cfg(name, value, owned))
    return join(*files, *(_entry(each, owned) for each in table))


def with_optional(
    strings: Sequence[bytes], credentials: Sequence[tuple[str, bytes]], optional: Sequence[tuple[str, bytes]]
) -> list[tuple[str, bytes]]:
    """Return the credentials, followed by the optional ones if the table has room for all of them."""
    room = TOTAL_MAX - sum(map(len, strings))
    for name, value in credentials:
        size = len(of_credential(name, value))
        room -= size if size <= room else 0
    fits = sum(len(of_credential(name, value)) for name, value in optional) <= room
    return [*credentials, *(optional if fits else ())]


def _entry(string: bytes, owned: Owned) -> Extras:
    path, file = content("smbios", string, owned)
    return join(file, Extras(arguments=("-smbios", f"type=11,path={path}")))


def _fw_cfg(name: str, value: bytes, owned: Owned) -> Extras:
    entry = _FW_CFG_DIRECTORY + name
    if len(entry) > _FW_CFG_NAME_MAX or "," in name:
        limit = _FW_CFG_NAME_MAX - len(_FW_CFG_DIRECTORY)
        raise StartError(
            f"the credentials are larger than {TOTAL_MAX} bytes, and {name} cannot be passed in another way",
            hint=f"give it a name of up to {limit} characters, without a comma",
        )
    path, file = content("credential", value, owned)
    return join(file, Extras(arguments=("-fw_cfg", f"name={entry},file={path}")))


def of_credential(name: str, value: bytes) -> bytes:
    """Return the string by which systemd in the guest gets a credential."""
    import binascii

    return f"io.systemd.credential.binary:{name}=".encode() + binascii.b2a_base64(value, newline=False)
