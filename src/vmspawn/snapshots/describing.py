# SPDX-License-Identifier: LGPL-2.1-or-later
"""Describes a machine for the manifest of its snapshot."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from ..boot.incoming import Recorded, value_of
from ..boot.state import CONFIG_FIELDS
from ..host.runtime import start_time
from ..machine.running import Running
from ..storage.attached_disk import AttachedDisk
from ..storage.freeze import Frozen
from ..storage.saved import save_disk
from .kept_files import KeptFiles
from .manifest import Firmware, Manifest, Source, State


class Prepared(NamedTuple):
    """Facts that are collected before the guest is stopped."""

    #: The command line, with the names of the kernel and the initrd in the snapshot's directory.
    recorded: Recorded
    #: The files of the command line's descriptors, by number.
    descriptors: dict[int, str]
    firmware: Firmware | None
    processor: str
    #: The ids of QEMU's devices.
    devices: frozenset[str]
    #: The attached disks, without those whose attach waits for the end of the save.
    disks: Sequence[AttachedDisk]


async def sizes_of(machine: Running) -> dict[str, int]:
    """Return the size of each disk in bytes, by its pivot node."""
    found = await machine.monitor.execute("query-named-block-nodes", {"flat": True})
    pivots = {each.identifiers.pivot for each in machine.storage}
    return {each["node-name"]: int(each["image"]["virtual-size"]) for each in found if each.get("node-name") in pivots}


def describe(
    machine: Running,
    name: str,
    prepared: Prepared,
    files: KeptFiles,
    frozen: Sequence[Frozen],
    sizes: dict[str, int],
    state: State,
    *,
    is_temporary: bool,
    was_running: bool,
) -> Manifest:
    """Return the manifest of a machine that is stopped, and whose overlays are not in use yet."""
    images = [image for disk in prepared.disks for top in disk.images for image in top.chain]
    options = prepared.recorded.options
    return Manifest(
        machine=machine.name,
        name=name,
        created=time.time(),
        parent=machine.fork.snapshot if machine.fork is not None else "",
        is_temporary=is_temporary,
        was_running=was_running,
        qemu=_source(machine),
        machine_type=value_of(options, "-machine") or "",
        accelerator=machine.accelerator,
        config={field: getattr(machine.config, field) for field in CONFIG_FIELDS},
        options=options,
        descriptors=prepared.descriptors,
        attachments=_attachments(machine, prepared, frozen),
        sizes=sizes,
        images=files.paths_of(images),
        files=files.described(),
        state=state,
        firmware=prepared.firmware,
        processor=prepared.processor,
        is_copy=machine.fork is not None,
        process=name_of_process(machine.pid),
    )


def name_of_process(pid: int) -> str:
    """Return a name for a process that no other process has, also after a restart of the host."""
    with open("/proc/sys/kernel/random/boot_id") as file:
        return f"{file.read().strip()} {pid} {start_time(pid)}"


def _source(machine: Running) -> Source:
    found = os.stat(f"/proc/{machine.pid}/exe")
    binary = machine.binary._asdict()
    return Source(machine.binary.path, machine.qemu_version, found.st_size, found.st_mtime_ns, binary)


def _attachments(machine: Running, prepared: Prepared, frozen: Sequence[Frozen]) -> dict[str, Any]:
    """Return the sections of the journal, with the disks as they were before they got their overlays."""
    journal = machine.journal
    found = {name: json.loads(journal.section(name) or "null") for name in journal.section_names}
    sections = {name: value for name, value in found.items() if isinstance(value, dict) and "attachments" in value}
    bases = {each.disk.name: each.base for each in frozen}
    sections["storage"]["attachments"] = [_disk(each, bases) for each in prepared.disks]
    for name, key in (("ports", "number"), ("controllers", "name")):
        if name in sections:
            sections[name]["attachments"] = [
                each
                for each in sections[name]["attachments"]
                if (f"stream{each[key]}" if name == "ports" else each.get(key, "scsi1")) in prepared.devices
            ]
    return sections


def _disk(disk: AttachedDisk, bases: dict[str, Any]) -> dict[str, Any]:
    images = [bases[disk.name]] if disk.name in bases else disk.images
    return save_disk(
        disk.disk,
        disk.identifiers,
        disk.place,
        disk.serial,
        images,
        limits=disk.limits,
        is_boot=disk.is_boot,
        done=disk.done,
    )
