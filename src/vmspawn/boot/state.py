# SPDX-License-Identifier: LGPL-2.1-or-later
"""Defines the sections of state.json other than the attachments, and reads the whole file.

This module is on the start path and imports next to nothing: the file is written before QEMU starts.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from ..errors import StartError
from ..helpers.helper import Helper
from ..host import runtime
from ..host.machined import Registration
from ..host.runtime import MachineDirectory
from ..hotplug.journal import Journal
from ..record import Record
from ..storage.saved import save_disk
from .boot_disk import BootDisk
from .config import MachineConfig
from .qemu import QemuBinary, find_qemu

#: The version of state.json's format. Older versions are read, newer ones are refused.
#: 1: had neither the accelerator, nor QEMU's features, nor sessions.
#: 2: had disks with longer names in QEMU, and did not record that.
STATE_VERSION = 3

#: The fields of MachineConfig that are saved: those that a manager uses while the machine runs, and those that specify
#: what the machine boots, without which no configuration is valid.
CONFIG_FIELDS = (
    "machine_type",
    "hotplug_ports",
    "guest",
    "image",
    "directory",
    "linux",
    "uuid",
    "cpus",
    "ram",
    "shutdown_timeout",
    "time_limit",
    "console_transport",
)


class SavedQemu(Record):
    """The QEMU process. `pid` is 0 if QEMU was about to be started; `started` is its start time as in proc(5)."""

    pid: int
    started: int
    accelerator: str


class SavedSessions(Record):
    """The objects that QMP sessions may have left in QEMU."""

    #: True if the machine has had a session.
    has_served: bool = False
    #: The names of the sessions' `getfd` descriptors, which QEMU cannot list.
    names: tuple[str, ...] = ()
    #: Descriptor sets that have existed since QEMU's start, and belong neither to vmspawn nor to a session.
    foreign_fdsets: tuple[int, ...] = ()

    def to_state(self) -> dict[str, object]:
        """Return the section of state.json."""
        return {"served": self.has_served, "names": self.names, "foreign_fdsets": self.foreign_fdsets}

    def to_json(self) -> str:
        """Return the section of state.json as text."""
        return json.dumps(self.to_state())


class SavedSaving(Record):
    """A save of the machine that was under way: the snapshot's unfinished directory, and whether the guest ran."""

    folder: str
    was_running: bool


class Fork(Record):
    """The snapshot that a machine is a copy of. `keep_disks` keeps the copy's disks when the copy ends."""

    snapshot: str
    keep_disks: bool = False


class SavedLoading(Record):
    """A copy's load of its state: the URI in QEMU, and whether the guest ran when it was saved."""

    uri: str
    was_running: bool
    has_ram_file: bool = False

    def to_json(self) -> str:
        """Return the section of state.json."""
        return json.dumps(self._asdict())


class SavedHelper(Record):
    """A process beside QEMU, as `Helper` describes it."""

    name: str
    what: str
    pid: int
    started: int


class State(Record):
    """A machine as its last manager left it. `attachments` has one section for each kind of attachment."""

    config: MachineConfig
    binary: QemuBinary
    qemu: SavedQemu
    sessions: SavedSessions
    helpers: tuple[SavedHelper, ...]
    attachments: dict[str, dict[str, Any]]
    #: The directory of a snapshot that was being made, and whether the guest ran before.
    saving: SavedSaving | None = None
    #: The state that a copy was loading.
    loading: SavedLoading | None = None
    fork: Fork | None = None


def open_journal(
    directory: MachineDirectory,
    config: MachineConfig,
    binary: QemuBinary,
    qemu: SavedQemu,
    helpers: Sequence[Helper],
    fork: Fork | None = None,
) -> Journal:
    """Return the writer of a machine's state.json, without sections."""
    return Journal(
        directory,
        {
            "version": STATE_VERSION,
            "name": config.name,
            "qemu": {**qemu._asdict(), **binary.to_state()},
            "machine": {field: getattr(config, field) for field in CONFIG_FIELDS},
            "registration": config.registration._asdict(),
            "fork": fork and fork._asdict(),
            "helpers": [SavedHelper(each.name, each.what, each.pid, runtime.start_time(each.pid)) for each in helpers],
        },
    )


def boot_storage(disks: Sequence[BootDisk], least: int = 0) -> str:
    """Return the register of a starting machine's disks as JSON. The next number is `least` or more."""
    saved = [
        save_disk(
            each.disk,
            each.identifiers,
            each.place,
            each.serial,
            each.images,
            limits=each.disk.limits,
            is_boot=each.is_boot,
        )
        for each in disks
    ]
    numbers = [each.identifiers.number for each in disks]
    numbers += [image.number for each in disks for top in each.images for image in top.chain]
    following = max(numbers, default=-1) + 1
    return json.dumps({"next": max(following, least), "attachments": saved})


def read(directory: MachineDirectory) -> State:
    """Read the state that the last manager wrote. Raises StartError if the state cannot be used."""
    name = directory.name
    try:
        found = runtime.read_state(directory.path)
        version = int(found["version"])
        if version > STATE_VERSION:
            raise StartError(
                f"machine {name} belongs to a newer vmspawn (its state has version {version}, not {STATE_VERSION})",
                hint="adopt it with that version",
            )
        if version < 2:
            found = _migrate_1(found)
        if version < 3:
            found = _migrate_2(found)
        return _load(name, found)
    except OSError as error:
        raise StartError(f"cannot adopt machine {name}: cannot read its state: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise damaged(directory, error) from None


def damaged(directory: MachineDirectory, error: Exception) -> StartError:
    """Return the error for a state that cannot be understood."""
    pid = runtime.running_qemu(directory.path)
    end = f"end its QEMU with: kill {pid}" if pid else "end its QEMU"
    return StartError(
        f"the state of machine {directory.name} is damaged: {error!r}",
        hint=f"please report it, with {directory.file(runtime.STATE)}; {end}",
    )


def _load(name: str, found: dict[str, Any]) -> State:
    wishes = found["registration"]
    registration = Registration(**{**wishes, "properties": tuple(wishes["properties"])})
    # A manager that is older than a field has not written it.
    fields = {field: found["machine"][field] for field in CONFIG_FIELDS if field in found["machine"]}
    config = MachineConfig(name=name, registration=registration, **fields)
    qemu = found["qemu"]
    sessions = found["sessions"]
    return State(
        config,
        QemuBinary.from_state(qemu),
        SavedQemu(int(qemu["pid"]), int(qemu["started"]), str(qemu["accelerator"])),
        SavedSessions(
            bool(sessions["served"]),
            tuple(map(str, sessions["names"])),
            tuple(map(int, sessions["foreign_fdsets"])),
        ),
        tuple(SavedHelper(*each) for each in found["helpers"]),
        # The section of disks always exists; the other kinds are newer.
        {"storage": dict(found["storage"])} | {key: value for key, value in found.items() if _is_section(value)},
        SavedSaving(**found["saving"]) if found.get("saving") else None,
        SavedLoading(**found["loading"]) if found.get("loading") else None,
        Fork(**found["fork"]) if found.get("fork") else None,
    )


def _is_section(value: object) -> bool:
    return isinstance(value, dict) and "attachments" in value


def _migrate_1(found: dict[str, Any]) -> dict[str, Any]:
    """Convert a state from version 1 to version 2. QEMU's binary is probed for the fields that version 1 lacks."""
    machine_type = found["machine"]["type"]
    binary = find_qemu(found["qemu"]["path"], machine_type)
    defaults = {field: MachineConfig._field_defaults[field] for field in CONFIG_FIELDS}
    machine = {"machine_type": machine_type, "hotplug_ports": found["machine"]["hotplug-ports"], "linux": "unknown"}
    return {
        **found,
        "qemu": {"accelerator": "unknown", **found["qemu"], **binary.to_state()},
        "machine": {**defaults, **machine},
        "registration": Registration()._asdict(),
        "sessions": SavedSessions(has_served=True).to_state(),
        "helpers": [],
    }


def _migrate_2(found: dict[str, Any]) -> dict[str, Any]:
    """Convert a state from version 2 to version 3."""
    for attachment in found["storage"]["attachments"]:
        for named in (attachment, *attachment["images"]):
            named["long-names"] = True
    return found
