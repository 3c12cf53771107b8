# SPDX-License-Identifier: LGPL-2.1-or-later
"""Holds a machine's configuration, and checks it as far as possible without touching a file.

This module is on the start path (docs/architecture.md), so it imports only modules of the start path.
"""

from __future__ import annotations

import os

from ..errors import BadConfig, UsageError
from ..host import machined
from ..host.machined import Registration
from ..host.runtime import NAME_MAX, check_name
from ..host.storageprovider import Volume
from ..network.forward import SSH_PORT, Forward, is_ssh
from ..record import Record
from ..storage.admission import check_disk
from ..storage.disk import DEFAULT_BUS, Disk, check_bus, default_name, with_defaults
from ..text import short_repr
from ..timeouts import SHUTDOWN_TIMEOUT
from . import credentials, firmware, memory
from .credentials import Credential
from .firmware import FirmwareWish
from .memory import Growth
from .shares import Share

MACHINE_TYPES = ("q35", "pc", "virt")
KVM_CHOICES = ("auto", "yes", "no")
CONSOLES = ("interactive", "native", "read-only", "gui", "headless")
CONSOLE_TRANSPORTS = ("serial", "virtio")

_MIB = 1 << 20
#: systemd-vmspawn's default.
RAM_DEFAULT = 2048 * _MIB
#: The built-in guest runs from an initramfs and needs little memory.
RAM_BUILTIN = 256 * _MIB
_RAM_MIN = 32 * _MIB
_CPUS_MAX = 255


class ConsoleTerminal(Record):
    """The terminal that shows the guest's console: its name in terminfo, and its window in characters.

    For an empty name, or 0, the guest uses its own default.
    """

    term: str
    rows: int
    columns: int


class MachineConfig(Record):
    """The configuration of a machine.


        config = MachineConfig(image="debian.qcow2", image_format="qcow2", ram=2 << 30)
        async with vmspawn.Machine(config, cpus=4) as machine: ...

    It boots one of: `guest` "builtin", optionally on the kernel `linux`; `linux` with an optional `initrd`; the kernel
    in `directory`; `image` by its own boot loader. Sizes are in bytes, times in seconds. None means that the field is
    not set; its default may depend on other fields.
    """

    name: str | None = None
    guest: str | None = None
    image: str | None = None
    image_format: str | None = None
    image_disk_type: str = DEFAULT_BUS
    discard_disk: bool = True
    linux: str | None = None
    initrd: str | None = None
    kernel_arguments: tuple[str, ...] = ()
    uuid: str | None = None
    cpus: int = 1
    ram: int | None = None
    kvm: str = "auto"
    machine_type: str = "q35"
    hotplug_ports: int | None = None
    extra_disks: tuple[Disk, ...] = ()
    on_error: str = ""
    qmp_log: str = ""
    console: str = "read-only"
    console_transport: str = CONSOLE_TRANSPORTS[0]
    console_log: str | None = None
    terminal: ConsoleTerminal | None = None
    qemu: str | None = None
    qemu_arguments: tuple[str, ...] = ()
    shutdown_timeout: float = SHUTDOWN_TIMEOUT
    time_limit: float | None = None
    registration: Registration = Registration()
    firmware: FirmwareWish = FirmwareWish()
    more_initrds: tuple[str, ...] = ()
    ram_growth: Growth | None = None
    ram_backing: str = memory.BACKINGS[0]
    network_user: bool = False
    forwards: tuple[Forward, ...] = ()
    vendor_strings: tuple[str, ...] = ()
    credentials: tuple[Credential, ...] = ()
    directory: str | None = None
    directory_rw: bool = False
    modules: str | None = None
    binds: tuple[Share, ...] = ()
    volumes: tuple[Volume, ...] = ()
    ephemeral: bool = False
    grow_image: int | None = None
    agent: bool = True
    cloud_init: str | None = None
    pass_ssh_key: bool | None = None
    ssh_key_type: str = "ed25519"
    die_with_program: bool = False
    die_with_parent: bool = False
    warm: bool = False

    def __repr__(self) -> str:
        return short_repr(self)

    @property
    def ram_bytes(self) -> int:
        """The guest's memory."""
        if self.ram is not None:
            return self.ram
        return RAM_BUILTIN if self.guest and not self.directory else RAM_DEFAULT

    @property
    def has_network(self) -> bool:
        """True if the machine has a network card from boot."""
        return self.network_user or bool(self.forwards)

    @property
    def is_userland(self) -> bool:
        """True if the built-in guest runs commands in a directory of the host."""
        return bool(self.guest and self.directory)

    @property
    def image_disk(self) -> Disk | None:
        """The image as a disk."""
        if not self.image:
            return None
        # A kernel that QEMU loads has the first place in the boot order.
        boot_index = -1 if self.linux or self.guest else 0
        name = default_name(self.image)
        return Disk(self.image, name, self.image_disk_type, self.image_format, boot_index=boot_index)


def check_config(config: MachineConfig) -> MachineConfig:
    """Return the configuration with its name and with the fields that other fields imply. Raises UsageError."""
    _check_texts(config)
    _check_choice("machine_type", config.machine_type, MACHINE_TYPES)
    _check_choice("kvm", config.kvm, KVM_CHOICES)
    _check_choice("console", config.console, CONSOLES)
    _check_choice("console_transport", config.console_transport, CONSOLE_TRANSPORTS)
    _check_choice("ram_backing", config.ram_backing, memory.BACKINGS)
    if config.console_log is not None and config.console == "native":
        raise UsageError.with_fields(
            "{console_log=} gets no output with {console=native}", hint="leave out one of the two"
        )
    if config.guest is not None:
        _check_choice("guest", config.guest, ("builtin",))
    _check_boot(config)
    config = config._replace(extra_disks=tuple(map(with_defaults, config.extra_disks)))
    _check_disks(config)
    if not 1 <= config.cpus <= _CPUS_MAX:
        raise UsageError.with_fields(
            "{cpus={count}} is out of range", hint="use 1 to {most}", count=config.cpus, most=_CPUS_MAX
        )
    if config.ram_bytes < _RAM_MIN:
        raise UsageError.with_fields(
            "{ram=} is too small for a guest ({size} bytes)", hint="use at least 32M", size=config.ram_bytes
        )
    if config.time_limit is not None and not config.time_limit > 0:
        raise UsageError.with_fields(
            "{time_limit={seconds}} leaves no time to run", hint="use more than 0 seconds", seconds=config.time_limit
        )
    if config.warm:
        _check_warm(config)
    if config.uuid is not None:
        _check_uuid(config.uuid)
    for forward in config.forwards:
        forward.check()
    if config.cloud_init is not None:
        config = _with_cloud_init(config)
    if config.pass_ssh_key:
        config = _with_ssh(config)
    machined.check(config.registration)
    firmware.check(config.firmware, direct_boot=bool(config.linux or config.guest))
    memory.check(config.ram_bytes, config.ram_growth)
    credentials.check(config.credentials)
    return config._replace(name=check_name(config.name if config.name is not None else _default_name(config)))


def _check_texts(config: MachineConfig) -> None:
    """Raise UsageError for a NUL character, which no path and no argument of a program can contain."""
    for field, value in config._asdict().items():
        texts = value if isinstance(value, tuple) else (value,)
        if any(isinstance(each, str) and "\0" in each for each in texts):
            raise UsageError.with_fields("{" + field + "=} contains a NUL character", hint="remove that character")


def _check_choice(field: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        template = "{" + field + "={value}} is not known"
        raise UsageError.with_fields(template, hint="choose one of: {choices}", value=value, choices=", ".join(choices))


def _check_boot(config: MachineConfig) -> None:
    if config.guest and config.initrd:
        raise UsageError.with_fields("{guest=builtin} brings its own initrd", hint="leave out {initrd=}, or {guest=}")
    if config.directory and config.image:
        raise UsageError.with_fields("{directory=} and {image=} both name the guest's root", hint=_LEAVE_ONE_OUT)
    if config.directory_rw and not config.is_userland:
        raise UsageError.with_fields(
            "{directory_rw=True} needs {guest=builtin} and {directory=}",
            hint="without {guest=builtin}, the directory is writable",
        )
    if config.modules and not (config.guest and config.linux):
        raise UsageError.with_fields(
            "{modules=} needs {guest=builtin} and {linux=}", hint="name the kernel that the modules belong to"
        )
    if config.ephemeral and not config.image:
        raise UsageError.with_fields(
            "{ephemeral=True} works only with {image=}",
            hint="name an image with {image=}, or leave out {ephemeral=True}",
        )
    if config.ephemeral and config.extra_disks:
        raise UsageError.with_fields("{ephemeral=True} does not work with {extra_disks=}", hint=_LEAVE_ONE_OUT)
    if config.binds and config.guest:
        raise UsageError.with_fields(
            "{binds=} needs systemd in the guest to mount the directories, and the built-in guest has none",
            hint="boot an image instead",
        )
    if config.initrd and not config.linux:
        raise UsageError.with_fields("{initrd=} needs {linux=}", hint="name the kernel that the initrd belongs to")
    if not (config.guest or config.linux or config.image or config.directory):
        raise UsageError.with_fields(
            "nothing to boot",
            hint="try {guest=builtin}, or name an image with {image=} or a directory with {directory=}",
        )


_LEAVE_ONE_OUT = "leave out one of them"

#: Fields that exclude `warm`: a copy of the booted guest would lack these objects, or the guest could not be saved.
_NOT_WARM = ("image", "extra_disks", "volumes", "qemu_arguments", "linux", "directory", "forwards")


def _check_warm(config: MachineConfig) -> None:
    if not config.guest:
        raise UsageError.with_fields("{warm=True} needs {guest=builtin}", hint="use a snapshot for other guests")
    for field in _NOT_WARM:
        if getattr(config, field):
            template = "{warm=True} does not work with {" + field + "=}"
            raise UsageError.with_fields(
                template, hint="attach disks and forward ports once the machine runs, or leave out {warm=True}"
            )
    if config.console in ("native", "gui"):
        template = "{warm=True} does not work with {console={console}}"
        raise UsageError.with_fields(template, hint=_LEAVE_ONE_OUT, console=config.console)


def _with_cloud_init(config: MachineConfig) -> MachineConfig:
    """Return the configuration with an SSH key, unless the user disabled it. Raises UsageError."""
    if not (config.image or config.directory) or config.guest:
        raise UsageError.with_fields(
            "{cloud_init=} needs an image or a directory with cloud-init", hint="name an image with {image=}"
        )
    return config if config.pass_ssh_key is not None else config._replace(pass_ssh_key=True)


def _with_ssh(config: MachineConfig) -> MachineConfig:
    """Return the configuration with a forward to the guest's SSH server. Raises UsageError for a guest without one."""
    if config.guest and (not config.directory or config.directory_rw):
        raise UsageError.with_fields(
            "{pass_ssh_key=} needs an SSH server in the guest, and the built-in guest has none",
            hint="boot an image; vmctl exec and vmctl copy need no server",
        )
    if any(is_ssh(each) for each in config.forwards):
        return config
    return config._replace(forwards=(*config.forwards, Forward(SSH_PORT)))


def _check_disks(config: MachineConfig) -> None:
    image = config.image_disk
    try:
        for disk in (*config.extra_disks, *((image,) if image else ())):
            # The bus `auto` is possible only for a disk that is attached to a running machine.
            check_bus(disk.bus)
            check_disk(disk)
    except BadConfig as error:
        raise UsageError(str(error), hint=error.hint) from None


def _check_uuid(text: str) -> None:
    digits = text.replace("-", "")
    if len(digits) != 32 or not set(digits.lower()) <= set("0123456789abcdef"):
        raise UsageError.with_fields(
            "{uuid={text}} is not a UUID", hint="write 32 hexadecimal digits, with or without dashes", text=text
        )
    if not digits.strip("0"):
        raise UsageError.with_fields("{uuid={text}} is the nil UUID", hint="make one with: uuidgen", text=text)


def _default_name(config: MachineConfig) -> str:
    """Return the name, without its suffix, of the file that boots. systemd-vmspawn does the same."""
    source = config.image or (config.directory or "").rstrip("/") or config.linux or config.guest or ""
    stem = os.path.basename(source)
    for suffix in (".raw", ".img", ".qcow2"):
        stem = stem.removesuffix(suffix)
    cleaned = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in stem)
    return cleaned.lstrip(".-")[:NAME_MAX] or "machine"
