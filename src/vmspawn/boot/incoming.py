# SPDX-License-Identifier: LGPL-2.1-or-later
"""Rewrites the command line of a running QEMU for a copy of its machine.

The copy must have the same devices, so it gets the source's command line, even if another version of vmspawn wrote it.
The machine's name, the monitors, the host's end of the console, and all disks are removed and written again. The
command line has the numbers of the descriptors that the source inherited; `Recorded.descriptors` lists them.

This module is on the start path and imports next to nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from ..host import runtime
from ..hotplug.places import PciPlace
from ..record import Record
from ..storage.image import FDSET_BASE
from . import console

#: Options that take no value.
_SWITCHES = frozenset({"-no-user-config", "-nodefaults", "-S", "-no-reboot", "-no-shutdown", "-snapshot"})

#: Places in the recorded options where the copy's own options go.
MONITORS, CONSOLE, SIZE, AGENT, DISKS = "@monitors", "@console", "@size", "@agent", "@disks"

#: Options whose files a snapshot keeps, under these names without the dash.
BOOT_FILES = ("-kernel", "-initrd")

#: The descriptor set of the saved state. The firmware and the base of an overlay have the numbers above it.
STATE_FDSET = FDSET_BASE - 8

#: The names of disks' and controllers' objects, which the register of attachments describes.
_OF_DISKS = re.compile(
    r"drive\d+(-pivot|-limits|-thread)?|limits\d+|image\d+(-file|-format)?|scsi1|scsi-thread|stream\d+"
)

#: The file with the guest's memory, as `memory.in_file` writes it.
_RAM_FILE = re.compile(r"memory-backend-file,(id=\w+,size=\d+B),mem-path=/proc/self/fd/(\d+),share=(on|off)")

_DESCRIPTOR_PATH = re.compile(r"/proc/self/fd/(\d+)")
_DESCRIPTOR_SET = re.compile(r"fd=(\d+),set=(\d+)")


class Option(Record):
    """An option with its value; `value` is None for an option that takes none."""

    name: str
    value: str | None = None


class Recorded(Record):
    """A command line without the options that differ in a copy, and the numbers of the descriptors that it needs."""

    options: tuple[Option, ...]
    descriptors: tuple[int, ...]


def record(arguments: Sequence[str], machine_type: str) -> Recorded:
    """Record a running QEMU's command line. `machine_type` is the versioned name, such as `pc-q35-7.2`."""
    kept = tuple(_kept(parse(arguments[1:]), machine_type))
    values = [option.value or "" for option in kept]
    numbers = {int(found) for value in values for found in _DESCRIPTOR_PATH.findall(value)}
    sets = (_DESCRIPTOR_SET.fullmatch(option.value or "") for option in kept if option.name == "-add-fd")
    numbers |= {int(found[1]) for found in sets if found}
    return Recorded(kept, tuple(sorted(numbers)))


def parse(arguments: Sequence[str]) -> Iterator[Option]:
    """Split arguments into options. A value follows each option that is not a switch."""
    rest = iter(arguments)
    for name in rest:
        yield Option(name) if name in _SWITCHES else Option(name, next(rest, None))


def _kept(options: Iterable[Option], machine_type: str) -> Iterator[Option]:
    """Yield the options that stay the same in a copy; placeholders stand for the others."""
    monitors = tuple(f"id={name}," for name in runtime.MONITORS)
    marked: set[str] = set()
    for option in options:
        value = option.value or ""
        place = _place(option, value, monitors)
        if place is None and option.name == "-machine":
            yield Option("-machine", ",".join((machine_type, *value.split(",")[1:])))
        elif (found := _RAM_FILE.fullmatch(value)) and found[3] == "off":
            # The machine is a copy that maps a snapshot's file. The new snapshot has all of the memory in QEMU's state.
            yield Option("-object", f"memory-backend-ram,{found[1]}")
        elif place is None:
            yield option
        elif place and place not in marked:
            marked.add(place)
            yield Option(place)
    # The disks come last, because an overlay may be based on a node that is kept.
    yield Option(DISKS)


def _place(option: Option, value: str, monitors: tuple[str, ...]) -> str | None:
    """Return the placeholder of an option that a copy rewrites, "" for an option that is left out, else None."""
    match option.name:
        case "-name" | "-incoming":
            return ""
        case "-chardev" if any(value.startswith(f"socket,{each}") for each in monitors):
            return MONITORS
        case "-mon" | "-object" if any(f"chardev={name}" in value.split(",") for name in runtime.MONITORS):
            return MONITORS
        case "-chardev" if value.startswith(f"stdio,id={console.CHARDEV},"):
            return CONSOLE
        case "-chardev" if value.startswith("socket,id=size,"):
            return SIZE
        case "-chardev" if value.startswith("socket,id=agent,"):
            return AGENT
        case "-chardev" if value.startswith("null,id=stream"):
            return ""
        case "-add-fd":
            found = _DESCRIPTOR_SET.fullmatch(value)
            return "" if found and (int(found[2]) >= FDSET_BASE or int(found[2]) == STATE_FDSET) else None
        case "-object" | "-blockdev" | "-device" if _OF_DISKS.fullmatch(_name_of(value)):
            return ""
        case _:
            return None


def _name_of(value: str) -> str:
    """Return the id or node name in an option's JSON, or an empty string for values in another form."""
    found = _json(value)
    return str(found.get("id") or found.get("node-name") or "")


def _json(value: str) -> dict[str, object]:
    if not value.startswith("{"):
        return {}
    try:
        found = json.loads(value)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def rebuild(
    options: Iterable[Option],
    places: Mapping[str, Sequence[str]],
    descriptors: Mapping[int, int],
) -> list[str]:
    """Return the arguments of a copy.

    `places` has the options for each placeholder. `descriptors` has the copy's descriptor for each descriptor of the
    source.
    """

    def path(found: re.Match[str]) -> str:
        return f"/proc/self/fd/{descriptors[int(found[1])]}"

    def in_set(found: re.Match[str]) -> str:
        return f"fd={descriptors[int(found[1])]},set={found[2]}"

    arguments: list[str] = []
    for option in options:
        if option.name in places:
            arguments += places[option.name]
        elif not option.name.startswith("@"):
            value = _DESCRIPTOR_PATH.sub(path, option.value) if option.value is not None else None
            if option.name == "-add-fd" and value is not None:
                value = _DESCRIPTOR_SET.sub(in_set, value)
            arguments += [option.name] if value is None else [option.name, value]
    return arguments


def devices(options: Iterable[Option]) -> Iterator[dict[str, object]]:
    """Yield the devices among the options."""
    for option in options:
        if option.name == "-device" and option.value:
            yield _json(option.value)


def descriptor_sets(options: Iterable[Option]) -> dict[int, int]:
    """Return the number of the descriptor set of each descriptor that QEMU inherited, by the descriptor's number."""
    found = (_DESCRIPTOR_SET.fullmatch(option.value or "") for option in options if option.name == "-add-fd")
    return {int(each[1]): int(each[2]) for each in found if each}


def writable_descriptors(options: Sequence[Option]) -> tuple[int, ...]:
    """Return the source's descriptors of writable files other than disks: UEFI's variables, the guest's memory."""
    sets = {str(file.get("filename")) for node in _nodes(options) if (file := _file_of(node))}
    found = (_DESCRIPTOR_SET.fullmatch(option.value or "") for option in options if option.name == "-add-fd")
    written = [int(each[1]) for each in found if each and f"/dev/fdset/{each[2]}" in sets]
    return (*written, memory) if (memory := ram_file(options)) >= 0 else tuple(written)


def ram_file(options: Iterable[Option]) -> int:
    """Return the source's descriptor of its own file with the guest's memory, or -1 if the source has no such file."""
    found = (_RAM_FILE.fullmatch(option.value or "") for option in options if option.name == "-object")
    return next((int(each[2]) for each in found if each and each[3] == "on"), -1)


def with_private_memory(option: Option) -> Option:
    """Return the option for a copy, which maps a file with the memory privately: its writes do not change the file."""
    is_ram = option.name == "-object" and _RAM_FILE.fullmatch(option.value or "")
    return Option("-object", (option.value or "").replace(",share=on", ",share=off")) if is_ram else option


def _nodes(options: Iterable[Option]) -> Iterator[dict[str, object]]:
    return (_json(option.value) for option in options if option.name == "-blockdev" and option.value)


def _file_of(node: dict[str, object]) -> dict[str, object] | None:
    """Return the file of a writable node, else None."""
    file = node.get("file")
    return file if isinstance(file, dict) and not node.get("read-only") else None


def take_node(options: Sequence[Option], name: str) -> tuple[list[Option], dict[str, object], int]:
    """Take a block node, and the descriptor set that its file is opened from, out of the options.

    Returns the other options, the node, and the source's descriptor; if the node does not exist, {} and -1.
    """
    node = next((each for each in _nodes(options) if each.get("node-name") == name), {})
    file = node.get("file")
    path = str(file.get("filename")) if isinstance(file, dict) else ""
    rest, number = [], -1
    for option in options:
        found = _DESCRIPTOR_SET.fullmatch(option.value or "") if option.name == "-add-fd" else None
        if found and f"/dev/fdset/{found[2]}" == path:
            number = int(found[1])
        elif not (option.name == "-blockdev" and _json(option.value or "") == node):
            rest.append(option)
    return rest, node, number


def claim_places(options: Iterable[Option], claim: Callable[[PciPlace], None]) -> None:
    """Claim the PCI places of all devices among the options."""
    for each in devices(options):
        if "bus" in each and "addr" in each:
            claim(PciPlace(str(each["bus"]), str(each["addr"])))


def value_of(options: Iterable[Option], name: str) -> str | None:
    """Return the value of the first option with a name."""
    return next((option.value for option in options if option.name == name), None)
