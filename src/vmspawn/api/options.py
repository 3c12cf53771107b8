# SPDX-License-Identifier: LGPL-2.1-or-later
"""Converts keyword arguments: those of Machine to a MachineConfig, and those of `attach` to a Disk."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, TypeAlias, TypedDict

from ..boot.config import ConsoleTerminal, MachineConfig
from ..boot.credentials import Credential
from ..boot.firmware import FirmwareWish
from ..boot.memory import Growth
from ..boot.shares import Share
from ..errors import UsageError
from ..host.machined import Registration
from ..host.storageprovider import Volume
from ..network import forward as forwarding
from ..network.forward import Forward
from ..sizes import SIZE_HINT, bytes_of
from ..storage.disk import Disk, parse_extra_drive
from ..storage.limits import Limits

StrPath: TypeAlias = str | os.PathLike[str]
#: A number of bytes, or a text as on the command line: "512M", "2G".
Size: TypeAlias = int | str

Bus: TypeAlias = Literal["auto", "virtio-blk", "nvme", "nvme-ns", "virtio-scsi", "scsi-cd"]


class MachineOptions(TypedDict, total=False):
    """The fields of MachineConfig, as Python values or as texts of the command line. MachineConfig documents them."""

    name: str | None
    guest: Literal["builtin"] | None
    image: StrPath | None
    image_format: str | None
    image_disk_type: str
    discard_disk: bool
    linux: StrPath | None
    initrd: StrPath | None
    kernel_arguments: Sequence[str]
    uuid: str | None
    cpus: int
    ram: Size | None
    kvm: Literal["auto", "yes", "no"] | bool
    machine_type: Literal["q35", "pc", "virt"]
    hotplug_ports: int | None
    extra_disks: Sequence[Disk | StrPath]
    on_error: str
    qmp_log: StrPath
    console: Literal["interactive", "native", "read-only", "gui", "headless"]
    console_transport: Literal["serial", "virtio"]
    console_log: StrPath | None
    terminal: ConsoleTerminal | None
    qemu: StrPath | None
    qemu_arguments: Sequence[str]
    shutdown_timeout: float
    time_limit: float | None
    registration: Registration
    firmware: FirmwareWish | str
    more_initrds: Sequence[StrPath]
    ram_growth: Growth | None
    ram_backing: Literal["anonymous", "file"]
    network_user: bool
    forwards: Sequence[Forward | str | int]
    vendor_strings: Sequence[str]
    credentials: Sequence[Credential]
    directory: StrPath | None
    directory_rw: bool
    modules: StrPath | None
    binds: Sequence[Share]
    volumes: Sequence[Volume]
    ephemeral: bool
    grow_image: Size | None
    agent: bool
    cloud_init: StrPath | None
    pass_ssh_key: bool | None
    ssh_key_type: str
    die_with_program: bool
    die_with_parent: bool
    warm: bool


class CopyOptions(TypedDict, total=False):
    """The fields of MachineConfig that may differ between a copy and its source.

    The copy has only the forwards in `forwards`: forwards of its source are not copied.
    """

    console: Literal["interactive", "read-only", "gui", "headless"]
    console_log: StrPath | None
    qmp_log: StrPath
    forwards: Sequence[Forward | str | int]
    shutdown_timeout: float
    die_with_program: bool
    die_with_parent: bool


class DiskOptions(TypedDict, total=False):
    """The fields of Disk except its path. Disk documents them."""

    name: str
    bus: Bus
    format: str | None
    read_only: bool
    serial: str
    discard: Literal["unmap", "ignore"]
    detect_zeroes: Literal["off", "on", "unmap"]
    cache: Literal["writeback", "none"]
    aio: Literal["threads", "io_uring"]
    thread: bool
    share: bool
    boot_index: int
    on_error: Literal["", "report", "stop", "enospc"]
    limits: Limits


def to_config(config: MachineConfig | None, options: Mapping[str, Any]) -> MachineConfig:
    """Return the configuration with its fields replaced by the options.

    Raises TypeError for an unknown option or a value of the wrong type, and UsageError for an invalid value.
    """
    check_names("Machine", options, MachineConfig._fields)
    fields = {name: _to_field(name, value) for name, value in options.items()}
    return (config or MachineConfig())._replace(**fields)


def to_copy_config(name: str, options: Mapping[str, Any]) -> MachineConfig:
    """Return the configuration with a copy's name, and with the fields in which the copy differs from its source.

    Raises TypeError and UsageError as `to_config` does.
    """
    check_names("fork", options, tuple(CopyOptions.__annotations__))
    return to_config(MachineConfig(name=name), options)


def to_disk(disk: Disk | StrPath, options: Mapping[str, Any]) -> Disk:
    """Return the disk at a path, or the disk itself, with its fields replaced by the options.

    Raises TypeError for an unknown option.
    """
    check_names("attach", options, Disk._fields[1:])
    named = disk if isinstance(disk, Disk) else Disk(os.fspath(disk))
    return named._replace(**options)


def to_size(field: str, value: Size) -> int:
    """Return a size in bytes. Raises TypeError, or UsageError, which names the field."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if not isinstance(value, str):
        raise _wrong_type(field, "bytes or a text such as '512M'", value)
    size = bytes_of(value)
    if size is None:
        raise UsageError.with_fields("{" + field + "={text}} is not a size", hint=SIZE_HINT, text=value)
    return size


def check_names(function: str, names: Iterable[str], known: Sequence[str]) -> None:
    """Raise TypeError for an unknown keyword argument."""
    for name in names:
        if name not in known:
            from difflib import get_close_matches

            close = get_close_matches(name, known, n=1)
            guess = f"; did you mean {close[0]!r}?" if close else ""
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}{guess}")


def _to_field(name: str, value: Any) -> Any:
    convert = _CONVERSIONS.get(name)
    return value if convert is None or value is None else convert(name, value)


def _path(name: str, value: StrPath) -> str:
    if not isinstance(value, str | os.PathLike):
        raise _wrong_type(name, "a path", value)
    return os.fspath(value)


def _wrong_type(name: str, expected: str, value: object) -> TypeError:
    return TypeError(f"{name}= must be {expected}, not {type(value).__name__}")


def _only(expected: str, *types: type) -> Callable[[str, Any], Any]:
    """Return a function that accepts only values of these types. A bool is not a number."""

    def check(name: str, value: Any) -> Any:
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            raise _wrong_type(name, expected, value)
        return value

    return check


def _yes_or_no(name: str, value: str | bool) -> str:
    if not isinstance(value, str | bool):
        raise _wrong_type(name, "'auto', True or False", value)
    return value if isinstance(value, str) else "yes" if value else "no"


def _firmware(name: str, value: FirmwareWish | str) -> FirmwareWish:
    if not isinstance(value, str | FirmwareWish):
        raise _wrong_type(name, "a text such as 'uefi'", value)
    return FirmwareWish(kind=value) if isinstance(value, str) else value


def _several(name: str, value: Iterable[Any]) -> tuple[Any, ...]:
    if isinstance(value, str | bytes | os.PathLike) or not isinstance(value, Iterable):
        raise _wrong_type(name, "a list or a tuple", value)
    return tuple(value)


def _paths(name: str, value: Iterable[StrPath]) -> tuple[str, ...]:
    return tuple(map(os.fspath, _several(name, value)))


def to_forward(value: Forward | str | int) -> Forward:
    """Return a forward for a number, which is the guest's port, or for a text with the command line's syntax.

    Raises UsageError.
    """
    if isinstance(value, str):
        return forwarding.parse(value)
    return (value if isinstance(value, Forward) else Forward(value)).check()


def _forwards(name: str, value: Iterable[Forward | str | int]) -> tuple[Forward, ...]:
    return tuple(map(to_forward, _several(name, value)))


def _disks(name: str, value: Iterable[Disk | StrPath]) -> tuple[Disk, ...]:
    """Return disks. A text is as on the command line: [FORMAT:][DISKTYPE:]PATH."""
    return tuple(
        parse_extra_drive(each) if isinstance(each, str) else to_disk(each, {}) for each in _several(name, value)
    )


#: Checks of values, by the annotation of their field. A bool accepts no text, because the text "no" is true in Python.
_CHECKS = {
    "bool": _only("True or False", bool),
    "str": _only("a text", str),
    "int": _only("a whole number", int),
    "float": _only("a number of seconds", int, float),
    "ConsoleTerminal": _only("a ConsoleTerminal", ConsoleTerminal),
    "Registration": _only("a Registration", Registration),
    "Growth": _only("a Growth", Growth),
}

#: Checks and conversions of values, by their field.
_CONVERSIONS: dict[str, Callable[[str, Any], Any]] = {
    **{
        name: _CHECKS[kind]
        for name, annotation in MachineConfig.__annotations__.items()
        if (kind := annotation.removesuffix(" | None")) in _CHECKS
    },
    **dict.fromkeys(("ram", "grow_image"), to_size),
    **dict.fromkeys(
        ("image", "linux", "initrd", "qmp_log", "console_log", "qemu", "directory", "modules", "cloud_init"), _path
    ),
    **dict.fromkeys(
        ("kernel_arguments", "qemu_arguments", "vendor_strings", "credentials", "binds", "volumes"), _several
    ),
    "kvm": _yes_or_no,
    "extra_disks": _disks,
    "firmware": _firmware,
    "forwards": _forwards,
    "more_initrds": _paths,
}
