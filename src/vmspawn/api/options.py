# SPDX-License-Identifier: LGPL-2.1-or-later
"""The keyword arguments of Machine: the fields of MachineConfig, each of which may be left out."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypedDict

from ..boot.config import ConsoleTerminal, MachineConfig
from ..boot.credentials import Credential
from ..boot.firmware import FirmwareWish
from ..boot.memory import Growth
from ..boot.shares import Share
from ..host.machined import Registration
from ..host.storageprovider import Volume
from ..storage.disk import Disk


class MachineOptions(TypedDict, total=False):
    """What MachineConfig says of each."""

    name: str | None
    guest: str | None
    image: str | None
    image_format: str | None
    image_disk_type: str
    discard_disk: bool
    linux: str | None
    initrd: str | None
    kernel_arguments: tuple[str, ...]
    uuid: str | None
    cpus: int
    ram: int | None
    kvm: str
    machine_type: str
    hotplug_ports: int | None
    extra_disks: tuple[Disk, ...]
    on_error: str
    qmp_log: str
    console: str
    console_transport: str
    console_log: str | None
    terminal: ConsoleTerminal | None
    qemu: str | None
    qemu_arguments: tuple[str, ...]
    shutdown_timeout: float
    time_limit: float | None
    registration: Registration
    firmware: FirmwareWish
    more_initrds: tuple[str, ...]
    ram_growth: Growth | None
    network_user: bool
    vendor_strings: tuple[str, ...]
    credentials: tuple[Credential, ...]
    directory: str | None
    binds: tuple[Share, ...]
    volumes: tuple[Volume, ...]
    ephemeral: bool
    grow_image: int | None
    agent: bool
    die_with_program: bool
    die_with_parent: bool


def check_names(names: Iterable[str]) -> None:
    """Raise TypeError for a keyword argument that is no field of MachineConfig."""
    for name in names:
        if name not in MachineConfig._fields:
            from difflib import get_close_matches

            close = get_close_matches(name, MachineConfig._fields, n=1)
            guess = f"; did you mean {close[0]!r}?" if close else ""
            raise TypeError(f"Machine() got an unexpected keyword argument {name!r}{guess}")
