# SPDX-License-Identifier: LGPL-2.1-or-later
"""Chooses a machine's firmware, and writes QEMU's arguments for it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable

from ..errors import StartError, UsageError
from ..images import kernel_image
from . import firmware, nvram, smbios
from .config import MachineConfig
from .extras import FLASH_FDSETS, Extras, Owned, fdset, fdset_path, join
from .firmware import Blob, Firmware

_INSTALL = "install it (Debian: ovmf, Fedora: edk2-ovmf)"
_INSTALL_OR_BIOS = _INSTALL + ", or use {firmware.kind=bios}"


def choose(config: MachineConfig, architecture: str, detail: Callable[[str], None]) -> Firmware | None:
    """Return the UEFI firmware for a machine, or None for QEMU's own.

    `auto` selects UEFI for an image, and QEMU's own firmware for the built-in guest and other kernels that QEMU can
    start, because UEFI takes several times as long. If no UEFI is installed, it selects BIOS and reports that to
    `detail`. Raises StartError or UsageError.
    """
    wish, kind = config.firmware, _kernel_kind(config)
    if wish.kind in ("bios", "none"):
        _refuse_without_uefi(config, kind)
        return None
    if kind == kernel_image.OTHER:
        _refuse_with_uefi(config)
        return None
    is_needed = kind in kernel_image.NEED_UEFI or bool(wish.field_requiring_uefi)
    is_direct = config.guest is not None or kind == kernel_image.LINUX
    if is_direct and not is_needed and not smbios.needs_uefi(config, architecture):
        return None
    found = firmware.select(wish, architecture, config.machine_type)
    if found is None:
        if is_needed:
            hint = _INSTALL if kind in kernel_image.NEED_UEFI else _INSTALL_OR_BIOS
            raise StartError.with_fields("{problem}", hint=hint, problem=_not_found(config))
        detail("no UEFI firmware is installed, so the machine boots by BIOS")
    return found


def _refuse_without_uefi(config: MachineConfig, kind: str | None) -> None:
    """Raise UsageError for a kernel that only UEFI can start."""
    if kind in kernel_image.NEED_UEFI:
        what = "a unified kernel image" if kind == kernel_image.UKI else "an EFI program"
        raise UsageError.with_fields(
            "{path} is {what}, which {firmware.kind={kind}} cannot start",
            hint="use {firmware.kind=uefi}",
            path=config.linux,
            what=what,
            kind=config.firmware.kind,
        )


def _refuse_with_uefi(config: MachineConfig) -> None:
    """Raise UsageError if the user requires UEFI, for a kernel that UEFI cannot start."""
    if field := config.firmware.field_requiring_uefi:
        raise UsageError.with_fields(
            field + " needs UEFI, which cannot start {path}: it is not a PE image",
            hint="leave out one of them, or name a kernel that was built with CONFIG_EFI_STUB",
            path=config.linux,
        )


def _kernel_kind(config: MachineConfig) -> str | None:
    return kernel_image.kind_of(config.linux) if config.linux else None


def _not_found(config: MachineConfig) -> str:
    features = [*config.firmware.include, *(f"no {each}" for each in config.firmware.exclude)]
    wanted = f" with {', '.join(features)}" if features else ""
    return f"no UEFI firmware{wanted} is installed for machines of type {config.machine_type}"


def extras(found: Firmware, config: MachineConfig, owned: Owned) -> Extras:
    """Return QEMU's arguments for the firmware and its variables. Raises StartError."""
    if found.is_in_memory:
        return Extras(arguments=("-bios", found.executable.path))
    code = owned.lend(_open(found.executable))
    parts = [_flash(0, "firmware-code", code, found.executable.format, read_only=True)]
    template = _template(found, config)
    if template is not None:
        path = nvram.state_path(config.firmware, config.image or config.directory, ephemeral=config.ephemeral)
        variables = owned.lend(nvram.open_state(path, template))
        parts.append(_flash(1, "firmware-variables", variables, template.format, read_only=False))
    if config.machine_type != "virt" and found.features & {"requires-smm", "secure-boot"}:
        # Only the firmware may write the variables, or the guest's kernel could enroll keys of its own.
        secure = ("-global", "driver=cfi.pflash01,property=secure,value=on")
        parts.append(Extras(machine=("smm=on",), arguments=secure))
    return join(*parts)


def _template(found: Firmware, config: MachineConfig) -> Blob | None:
    if path := config.firmware.nvram_template:
        return Blob(path, found.template.format if found.template else "raw")
    return found.template


def _open(blob: Blob) -> int:
    try:
        return os.open(blob.path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise StartError.with_fields(
            "cannot open the firmware {path}: {reason}", hint=_INSTALL_OR_BIOS, path=blob.path, reason=error.strerror
        ) from None


def _flash(number: int, name: str, fd: int, image_format: str, *, read_only: bool) -> Extras:
    path = fdset_path(FLASH_FDSETS[number])
    file = {"driver": "file", "filename": path, "read-only": read_only, "auto-read-only": False}
    node = {"driver": image_format, "node-name": name, "read-only": read_only, "file": file}
    flash = Extras(machine=(f"pflash{number}={name}",), arguments=("-blockdev", json.dumps(node)))
    return join(fdset(FLASH_FDSETS[number], fd), flash)
