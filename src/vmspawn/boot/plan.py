# SPDX-License-Identifier: LGPL-2.1-or-later
"""Turns a configuration into a plan of the machine, in two steps.

`choose` finds the binary, the accelerator and the kernel. It may take long, because it probes QEMU and makes the
built-in guest, and leaves nothing to undo. `make_plan` opens files and starts processes that QEMU inherits.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ..errors import StartError
from ..host.runtime import MachineDirectory
from ..hotplug import places
from ..images import kernel_image
from ..record import Record
from . import agent, console, credentials, memory, network, shares, smbios, ssh_key, uefi
from .boot_disk import BootDisk
from .config import MachineConfig
from .extras import NO_EXTRAS, Extras, Owned, content, join, take_place
from .qemu import QemuBinary, choose_accelerator, find_qemu
from .state import Fork

if TYPE_CHECKING:
    from ..guest.builtin import BuiltinGuest

#: Kernel arguments under emulation, by architecture: on a busy host the kernel's check of the timer fails, and the
#: kernel panics ("IO-APIC + timer doesn't work").
_UNDER_TCG = {"x86_64": ("no_timer_check",)}

#: Kernel arguments by which the user specifies the root.
_ROOT = ("root=", "mount.usr=")


class Kernel(Record):
    """The kernel that QEMU loads."""

    path: str
    initrd: str | None
    arguments: tuple[str, ...]


class Choices(Record):
    """The choices that are made for a machine before anything of it exists."""

    config: MachineConfig
    binary: QemuBinary
    accelerator: str
    #: The reason why QEMU emulates the guest although the user allows KVM, or an empty string.
    why_emulated: str
    layout: places.Layout
    #: The kernel that QEMU loads, with the arguments that belong to it; None if the image's boot loader loads it.
    kernel: Kernel | None


class Plan(Record):
    """Everything that QEMU's command line is written from."""

    config: MachineConfig
    binary: QemuBinary
    accelerator: str
    layout: places.Layout
    kernel: Kernel | None
    disks: tuple[BootDisk, ...]
    extras: Extras
    #: True if BIOS boots the image.
    is_bios_boot: bool = False
    #: Sections of the journal of the machine that this is a copy of.
    attachments: Mapping[str, Mapping[str, Any]] = {}
    fork: Fork | None = None


class Reporter(Record):
    """Prints lines about the start: `notice` prints lines that every user should see, `detail` verbose output."""

    notice: Callable[[str], None]
    detail: Callable[[str], None]


# First step.


def choose(config: MachineConfig, report: Reporter) -> Choices:
    """Find QEMU, the accelerator and the kernel. Raises StartError, UsageError."""
    config = _with_own_kernel(config)
    binary = find_qemu(config.qemu, config.machine_type)
    layout = places.layout(config.machine_type, config.hotplug_ports, namespaces=binary.has_namespaces)
    accelerator, why_emulated = choose_accelerator(config.kvm, binary.architecture)
    kernel = _choose_kernel(config, binary.architecture, report.notice)
    _check_virtiofs(config, report.notice)
    return Choices(config, binary, accelerator, why_emulated, layout, kernel)


def _with_own_kernel(config: MachineConfig) -> MachineConfig:
    """Fill in the kernel that the directory contains, if the user names none. Raises StartError."""
    if config.directory is None or config.linux is not None or config.guest:
        return config
    from ..images import boot_entries

    shares.check("directory", config.directory)
    linux, initrds = boot_entries.find(config.directory)
    return config._replace(linux=linux, initrd=initrds[0] if initrds else None, more_initrds=initrds[1:])


def _choose_kernel(config: MachineConfig, architecture: str, notice: Callable[[str], None]) -> Kernel | None:
    if config.guest:
        guest = _builtin_guest(architecture, notice)
        if config.linux is not None:
            _check_readable("linux", config.linux)
            _check_architecture(config, config.linux, architecture)
        return Kernel(config.linux or guest.kernel, guest.initrd, tuple(guest.arguments))
    if config.linux is None:
        return None
    _check_readable("linux", config.linux)
    _check_architecture(config, config.linux, architecture)
    if config.initrd:
        _check_readable("initrd", config.initrd)
    return Kernel(config.linux, config.initrd, ())


def _check_virtiofs(config: MachineConfig, notice: Callable[[str], None]) -> None:
    """Warn of a kernel that cannot mount its root directory: the guest would stop in a shell without an explanation."""
    if config.directory is None or config.linux is None or config.guest:
        return
    from ..images import virtiofs_support

    initrds = [each for each in (config.initrd, *config.more_initrds) if each is not None]
    if why := virtiofs_support.why_not(config.directory, config.linux, initrds):
        notice(f"the guest may not find its root: {why}")


def _builtin_guest(architecture: str, notice: Callable[[str], None]) -> BuiltinGuest:
    from ..guest import builtin

    if guest := builtin.find(architecture):
        return guest
    from ..guest.build import build

    return build(architecture, on_progress=notice)


def _check_readable(field: str, path: str) -> None:
    """Raise StartError for an empty or unreadable file, which QEMU would open by its path."""
    try:
        with open(path, "rb") as file:
            if not file.read(1):
                raise _unusable(field, path, "the file is empty")
    except OSError as error:
        raise _unusable(field, path, error.strerror) from None


def _check_architecture(config: MachineConfig, linux: str, architecture: str) -> None:
    """Raise StartError for a kernel of another architecture: QEMU would load it, and the guest would hang."""
    found = kernel_image.architecture_of(linux)
    if found not in ("", architecture):
        raise StartError.with_fields(
            "{path} is a kernel for {found}, and {machine_type={type}} is {architecture}",
            hint="name another kernel, or another {machine_type=}",
            path=linux,
            found=found,
            type=config.machine_type,
            architecture=architecture,
        )


def _unusable(field: str, path: str, reason: str | None) -> StartError:
    return StartError.with_fields("cannot use {" + field + "={path}}: {reason}", path=path, reason=reason)


# Second step.


def make_plan(
    chosen: Choices, disks: tuple[BootDisk, ...], directory: MachineDirectory, report: Reporter, owned: Owned
) -> Plan:
    """Choose the firmware, start the helpers, and write the kernel's arguments. Raises StartError, UsageError."""
    config = chosen.config
    found = uefi.choose(config, chosen.binary.architecture, report.detail)
    if found is None and smbios.needs_uefi(config, chosen.binary.architecture):
        _refuse_strings(config)
    firmware = uefi.extras(found, config, owned) if found is not None else NO_EXTRAS
    card = network.user_card(take_place(chosen.layout)) if config.has_network else NO_EXTRAS
    backing = _memory(config, owned)
    shared = _shares(chosen, directory, report, owned)
    arguments = _kernel_arguments(chosen, shared.kernel_arguments)
    for each in _of_emulation(chosen):
        report.detail(f"the kernel gets {each}, because its check of the timer may fail under emulation")
    smbios.check_kernel_arguments(arguments)
    brought = agent.credentials(
        config,
        chosen.binary.architecture,
        report.detail,
        smbios=found is not None or smbios.is_available_without_uefi(chosen.binary.architecture),
    )
    own = {shares.FSTAB_CREDENTIAL: shares.fstab(config.binds), **ssh_key.credentials(config, directory)}
    texts = _strings(chosen, arguments)
    strings = smbios.extras(texts, smbios.with_optional(texts, list(_credentials(config, own)), brought), owned)
    kernel, initrd = _load(chosen, arguments, owned)
    extras = join(backing, firmware, card, shared, strings, initrd)
    is_bios_boot = found is None and kernel is None
    return Plan(config, chosen.binary, chosen.accelerator, chosen.layout, kernel, disks, extras, is_bios_boot)


def _memory(config: MachineConfig, owned: Owned) -> Extras:
    """Return QEMU's arguments for the guest's memory; none if QEMU's default is used. Raises StartError."""
    if config.ram_backing == "file":
        return memory.in_file(config.ram_bytes, owned)
    return memory.shared(config.ram_bytes) if config.directory or config.binds else NO_EXTRAS


def _shares(chosen: Choices, directory: MachineDirectory, report: Reporter, owned: Owned) -> Extras:
    config = chosen.config
    if not (config.directory or config.binds):
        return NO_EXTRAS
    served = shares.start(config.directory, config.binds, directory, chosen.layout, report.notice, owned)
    if config.is_userland:
        served = served._replace(kernel_arguments=(f"vmspawn.userland={'rw' if config.directory_rw else 'ro'}",))
    return served


def _refuse_strings(config: MachineConfig) -> None:
    """Raise StartError for a setting that only UEFI would pass to the guest, by SMBIOS."""
    raise StartError.with_fields(
        smbios.wishes(config)[0] + " needs UEFI on machines of type {type}",
        hint="use {firmware.kind=uefi}",
        type=config.machine_type,
    )


def _kernel_arguments(chosen: Choices, of_extras: tuple[str, ...]) -> tuple[str, ...]:
    """Put the kernel's arguments together. The user's arguments come last, so that they take precedence."""
    config = chosen.config
    of_kernel = chosen.kernel.arguments if chosen.kernel is not None else ()
    own = (*console.kernel_arguments(config), *of_kernel, *_of_emulation(chosen))
    return (*own, *_root(chosen), *of_extras, *config.kernel_arguments)


def _of_emulation(chosen: Choices) -> tuple[str, ...]:
    """Return the arguments that the user's kernel needs under emulation. The built-in guest brings its arguments."""
    if chosen.accelerator != "tcg" or not chosen.config.linux or _passed_by_smbios(chosen):
        return ()
    return _UNDER_TCG.get(chosen.binary.architecture, ())


def _root(chosen: Choices) -> tuple[str, ...]:
    """Return the argument that names the image's root, for a kernel that QEMU loads. Raises StartError."""
    config = chosen.config
    if not config.linux or not config.image or _passed_by_smbios(chosen):
        return ()
    if any(each.startswith(_ROOT) for each in config.kernel_arguments):
        return ()
    return (_find_root(config, config.image, chosen.binary.architecture),)


def _find_root(config: MachineConfig, image: str, architecture: str) -> str:
    from ..images import partitions, qcow2

    def read_raw(offset: int, length: int) -> bytes:
        return os.pread(fd, length, offset)

    try:
        fd = os.open(image, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise _unusable("image", image, error.strerror) from None
    try:
        read = qcow2.Reader(fd, image).read if config.image_format == "qcow2" else read_raw
        return partitions.root_argument(read, architecture=architecture, bus=config.image_disk_type, path=image)
    finally:
        os.close(fd)


def _passed_by_smbios(chosen: Choices) -> bool:
    """Return whether a boot loader or a UKI's stub passes the kernel's arguments, instead of QEMU's -append."""
    if chosen.kernel is None:
        return True
    linux = chosen.config.linux
    return linux is not None and kernel_image.kind_of(linux) == kernel_image.UKI


def _strings(chosen: Choices, arguments: tuple[str, ...]) -> list[bytes]:
    """Return the SMBIOS strings, credentials excepted."""
    found = list(console.vendor_strings(chosen.config)) if chosen.kernel is None else []
    found += map(os.fsencode, chosen.config.vendor_strings)
    if _passed_by_smbios(chosen):
        found += smbios.of_kernel_arguments(arguments)
    return found


def _credentials(config: MachineConfig, own: Mapping[str, bytes]) -> Iterator[tuple[str, bytes]]:
    """Yield the user's and vmspawn's `own` credentials. If both have a name, the lines of `own` follow the user's."""
    rest = {name: lines for name, lines in own.items() if lines}
    for each in config.credentials:
        value = credentials.load(each)
        if lines := rest.pop(each.name, b""):
            value = value.rstrip(b"\n") + b"\n" + lines
        yield each.name, value
    yield from rest.items()


def _load(chosen: Choices, arguments: tuple[str, ...], owned: Owned) -> tuple[Kernel | None, Extras]:
    """Return the kernel as QEMU loads it, and the descriptor of its initrd if vmspawn composes the initrd in memory."""
    kernel, config = chosen.kernel, chosen.config
    if kernel is None:
        return None, NO_EXTRAS
    initrd, file = kernel.initrd, NO_EXTRAS
    if initrd is not None and config.guest and (config.linux is not None or config.is_userland):
        from . import own_kernel

        initrd, file = content("initrd", own_kernel.initrd(config, initrd), owned)
    if config.initrd is not None and config.more_initrds:
        initrd, file = content("initrd", _merged((config.initrd, *config.more_initrds)), owned)
    return Kernel(kernel.path, initrd, () if _passed_by_smbios(chosen) else arguments), file


def _merged(initrds: tuple[str, ...]) -> bytes:
    """Merge initrds into one: the kernel unpacks them one after the other."""
    merged = bytearray()
    for path in initrds:
        merged += bytes(-len(merged) % kernel_image.INITRD_ALIGNMENT)
        try:
            with open(path, "rb") as file:
                merged += file.read()
        except OSError as error:
            raise _unusable("initrd", path, error.strerror) from None
    return bytes(merged)
