# SPDX-License-Identifier: LGPL-2.1-or-later
"""All that a machine gets beside its disks, in the order in which one thing depends on another."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from ..errors import StartError
from ..hotplug import places
from ..images import kernel_image
from . import credentials, memory, smbios, uefi
from .commandline import Boot
from .config import MachineConfig
from .extras import Additions

if TYPE_CHECKING:
    from .launch import Launched

#: An initramfs begins where the number of bytes before it is a multiple of this (the kernel's buffer-format.txt).
_INITRD_ALIGNMENT = 4

#: Where a guest has SMBIOS whatever the firmware is.
_SMBIOS_BY_ITSELF = ("x86_64",)

#: Kernel arguments by which the user says what the root is.
_ROOT = ("root=", "mount.usr=")


def complete(config: MachineConfig) -> MachineConfig:
    """The configuration with the kernel that a directory brings, if the user names none. Raises StartError."""
    if config.directory is None or config.linux is not None:
        return config
    from ..images import boot_entries
    from . import shares

    shares.check("--directory=", config.directory)
    linux, initrds = boot_entries.find(config.directory)
    return config._replace(linux=linux, initrd=initrds[0] if initrds else None, more_initrds=initrds[1:])


def prepare(
    launched: Launched,
    boot: Boot | None,
    console_arguments: tuple[str, ...],
    notice: Callable[[str], None],
    detail: Callable[[str], None],
) -> Boot | None:
    """Collect the additions; returns the boot with what they add to it. `console_arguments` are for a kernel that is
    not ours. Raises StartError, UsageError.
    """
    additions, config, layout = launched.additions, launched.config, launched.layout
    architecture = launched.binary.architecture
    found = uefi.choose(config, architecture, detail)
    if found is not None:
        uefi.add(additions, found, config)
    if config.network_user:
        _add_network(additions, layout)
    if config.directory or config.binds:
        from . import shares

        memory.share(additions, config.ram_bytes)
        assert launched.directory is not None
        shares.start(additions, config.directory, config.binds, launched.directory, lambda: take_place(layout), notice)
    additions.vendor_strings += [os.fsencode(each) for each in config.vendor_strings]
    if architecture not in _SMBIOS_BY_ITSELF and found is None:
        _refuse_strings(config)
    boot = _complete(launched, boot, console_arguments)
    smbios.add(additions, _credentials(config))
    return boot


def _credentials(config: MachineConfig) -> Iterator[tuple[str, bytes]]:
    """The credentials by name; our lines for the guest's fstab are added to those that the user gives it."""
    from .shares import FSTAB_CREDENTIAL, fstab

    lines = fstab(config.binds)
    for each in config.credentials:
        value = credentials.load(each)
        if each.name == FSTAB_CREDENTIAL and lines:
            value, lines = value.rstrip(b"\n") + b"\n" + lines, b""
        yield each.name, value
    if lines:
        yield FSTAB_CREDENTIAL, lines


def _refuse_strings(config: MachineConfig) -> None:
    """On these machines only UEFI hands SMBIOS on to the guest, and what is to go by it would be lost."""
    wishes = {"--set-credential=": config.credentials, "--smbios11=": config.vendor_strings, "--bind=": config.binds}
    for option, wish in wishes.items():
        if wish:
            raise StartError(
                f"{option} needs UEFI on machines of type {config.machine_type}", hint="use --firmware=uefi"
            )


def _complete(launched: Launched, boot: Boot | None, console_arguments: tuple[str, ...]) -> Boot | None:
    """Give the kernel its arguments: by -append, or by SMBIOS where a boot loader or a UKI's stub passes them."""
    additions, config = launched.additions, launched.config
    is_uki = config.linux is not None and kernel_image.kind_of(config.linux) == kernel_image.UKI
    if boot is None or is_uki:
        arguments = (*console_arguments, *additions.kernel_arguments, *config.kernel_arguments)
        smbios.check_kernel_arguments(arguments)
        additions.vendor_strings += smbios.of_kernel_arguments(arguments)
        return None if boot is None else boot._replace(arguments=(), initrd=_initrd(additions, config, boot))
    arguments = boot.arguments
    if config.linux and config.image and not any(each.startswith(_ROOT) for each in config.kernel_arguments):
        arguments += (_root(config, config.image, launched.binary.architecture),)
    arguments += tuple(additions.kernel_arguments)
    smbios.check_kernel_arguments(arguments)
    return boot._replace(arguments=arguments, initrd=_initrd(additions, config, boot))


def _root(config: MachineConfig, image: str, architecture: str) -> str:
    from ..images import partitions, qcow2

    def read_raw(offset: int, length: int) -> bytes:
        return os.pread(fd, length, offset)

    try:
        fd = os.open(image, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise StartError(f"cannot use --image={image}: {error.strerror}") from None
    try:
        read = qcow2.Reader(fd, image).read if config.image_format == "qcow2" else read_raw
        return partitions.root_argument(read, architecture=architecture, bus=config.image_disk_type, path=image)
    finally:
        os.close(fd)


def _initrd(additions: Additions, config: MachineConfig, boot: Boot) -> str | None:
    """One initrd as it is; several as one, which is what a kernel makes of them one after the other."""
    if not config.more_initrds:
        return boot.initrd
    merged = bytearray()
    for path in (config.initrd, *config.more_initrds):
        assert path is not None
        merged += bytes(-len(merged) % _INITRD_ALIGNMENT)
        try:
            with open(path, "rb") as file:
                merged += file.read()
        except OSError as error:
            raise StartError(f"cannot use --initrd={path}: {error.strerror}") from None
    return additions.add_content("initrd", bytes(merged))


def take_place(layout: places.Layout) -> places.Place:
    """A slot for a device that is there from boot. Raises NoFreePort."""
    place = layout.boot.take()
    layout.pci.claim(place)
    return place


def _add_network(additions: Additions, layout: places.Layout) -> None:
    """A network card behind QEMU's own NAT, which needs no right on the host."""
    device = {
        "driver": "virtio-net-pci",
        "id": "network0",
        "netdev": "network0-user",
        **take_place(layout).properties(),
    }
    # No boot over this network, and no need for the ROM that would do it.
    device["romfile"] = ""
    additions.arguments += ["-netdev", "user,id=network0-user", "-device", json.dumps(device)]
