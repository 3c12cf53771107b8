# SPDX-License-Identifier: LGPL-2.1-or-later
"""Runs QEMU virtual machines: hot-plugs disks, shares the QMP socket, and shuts guests down cleanly.

    import vmspawn

    async with vmspawn.Machine(guest="builtin", ram="512M") as machine:     # a machine of your own
        await machine.attach("data.raw", bus="virtio-scsi")

    async with vmspawn.connect("demo") as machine:                          # a machine of another process
        print(await machine.disks())

`vmspawn.sync` has the same classes with blocking calls. All errors are subclasses of VmspawnError. An error's
`hint` is advice.
"""

# Each name is imported when it is first used, because the commands must start fast. This file imports nothing, not even
# `typing`: until an entry point of a command is called, SIGINT prints a traceback of the imports.
TYPE_CHECKING = False

if TYPE_CHECKING:
    from . import sync as sync
    from .api.attached_disk import AttachedDisk as AttachedDisk
    from .api.attached_disk import DiskStatus as DiskStatus
    from .api.connect import ConnectedMachine as ConnectedMachine
    from .api.connect import connect as connect
    from .api.console import Console as Console
    from .api.control import Qmp as Qmp
    from .api.events import Events as Events
    from .api.execution import Completed as Completed
    from .api.execution import Execution as Execution
    from .api.machine import Machine as Machine
    from .api.machine import Snapshot as Snapshot
    from .boot.config import MachineConfig as MachineConfig
    from .boot.credentials import Credential as Credential
    from .boot.memory import Growth as Growth
    from .boot.shares import Share as Share
    from .errors import BadConfig as BadConfig
    from .errors import CommandFailed as CommandFailed
    from .errors import ConfigNotSupported as ConfigNotSupported
    from .errors import CopyFailed as CopyFailed
    from .errors import EventsLost as EventsLost
    from .errors import GuestError as GuestError
    from .errors import MachineEnded as MachineEnded
    from .errors import NoFreePort as NoFreePort
    from .errors import NoSuchForward as NoSuchForward
    from .errors import NoSuchSnapshot as NoSuchSnapshot
    from .errors import NoSuchStorage as NoSuchStorage
    from .errors import NotConnected as NotConnected
    from .errors import NotInstalled as NotInstalled
    from .errors import NotSupported as NotSupported
    from .errors import PortInUse as PortInUse
    from .errors import ProtocolError as ProtocolError
    from .errors import QmpError as QmpError
    from .errors import SnapshotBlocked as SnapshotBlocked
    from .errors import SnapshotExists as SnapshotExists
    from .errors import SnapshotInUse as SnapshotInUse
    from .errors import StartError as StartError
    from .errors import StorageExists as StorageExists
    from .errors import StorageImmutable as StorageImmutable
    from .errors import StoragePending as StoragePending
    from .errors import SystemFailure as SystemFailure
    from .errors import Timeout as Timeout
    from .errors import UsageError as UsageError
    from .errors import VmspawnError as VmspawnError
    from .errors import VolumeError as VolumeError
    from .host.storageprovider import Volume as Volume
    from .machine.ending import End as End
    from .network.forward import Forward as Forward
    from .qmp.events import Event as Event
    from .storage.disk import Disk as Disk
    from .storage.limits import Limits as Limits

_NAMES_OF = {
    "api.attached_disk": ("AttachedDisk", "DiskStatus"),
    "api.connect": ("ConnectedMachine", "connect"),
    "api.console": ("Console",),
    "api.control": ("Qmp",),
    "api.events": ("Events",),
    "api.execution": ("Completed", "Execution"),
    "api.machine": ("Machine", "Snapshot"),
    "boot.config": ("MachineConfig",),
    "boot.credentials": ("Credential",),
    "boot.memory": ("Growth",),
    "boot.shares": ("Share",),
    "errors": (
        "BadConfig",
        "CommandFailed",
        "ConfigNotSupported",
        "CopyFailed",
        "EventsLost",
        "GuestError",
        "MachineEnded",
        "NoFreePort",
        "NoSuchForward",
        "NoSuchSnapshot",
        "NoSuchStorage",
        "NotConnected",
        "NotInstalled",
        "NotSupported",
        "PortInUse",
        "ProtocolError",
        "QmpError",
        "SnapshotBlocked",
        "SnapshotExists",
        "SnapshotInUse",
        "StartError",
        "StorageExists",
        "StorageImmutable",
        "StoragePending",
        "SystemFailure",
        "Timeout",
        "UsageError",
        "VmspawnError",
        "VolumeError",
    ),
    "host.storageprovider": ("Volume",),
    "machine.ending": ("End",),
    "network.forward": ("Forward",),
    "qmp.events": ("Event",),
    "storage.disk": ("Disk",),
    "storage.limits": ("Limits",),
}
_MODULE_OF = {name: module for module, names in _NAMES_OF.items() for name in names}

__all__ = sorted(_MODULE_OF)


if not TYPE_CHECKING:
    # Type checkers must not see this function: it would accept any name.
    def __getattr__(name: str) -> object:
        if name not in _MODULE_OF and name != "sync":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        if name == "sync":
            return import_module(".sync", __name__)
        return getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*__all__, "sync"]
