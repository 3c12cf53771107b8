# SPDX-License-Identifier: LGPL-2.1-or-later
"""The verbs of vmctl that are about disks."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from typing import Any

from ...boot.config import parse_size
from ...control.client import REPLY_TIMEOUT, Client, VarlinkError
from ...errors import UsageError, VmspawnError
from ...storage import backing as backings
from ...storage.disk import (
    AIO_CHOICES,
    AUTO_BUS,
    BUSES,
    CACHE_CHOICES,
    DEFAULT_BUS,
    DETECT_ZEROES_CHOICES,
    DISCARD_CHOICES,
    ON_ERROR_CHOICES,
    default_name,
    is_only_read,
)
from ...storage.formats import FORMATS
from ...storage.limits import BURST_MAX
from ...text import printable, utf8
from ..parser import number
from ..tables import format_size, print_json
from .calling import MACHINE, client_for, context, show

#: Seconds beyond the guest's time that the manager has for its answer.
_GRACE = 10.0

#: Seconds that a detach waits for the guest, as the manager does by itself.
_DETACH_TIMEOUT = 30.0

#: Seconds over which `list-disks --stats` looks.
_STATISTICS_SECONDS = 1.0

_AddVerb = Callable[[Any, str, Callable[[argparse.Namespace], None], str], argparse.ArgumentParser]


def add_verbs(verbs: Any, add_verb: _AddVerb) -> None:
    """Add the verbs; `add_verb` makes one that takes a machine."""

    def add(name: str, arguments: str, action: Callable[[argparse.Namespace], None], text: str) -> Any:
        parser = add_verb(verbs, name, action, text)
        parser.usage = f"vmctl {name} MACHINE {arguments}[OPTION…]"
        for word in arguments.split():
            parser.add_argument(word.lower(), metavar=word, help=_ARGUMENTS[word])
        return parser

    _add_attach_options(add("attach-disk", "PATH ", _attach, "plug a disk into a running machine"))
    detach = add("detach-disk", "DISK ", _detach, "unplug a disk from a running machine")
    detach.add_argument("--no-wait", action="store_true", help="ask the guest, and do not wait for it")
    detach.add_argument(
        "--force", action="store_true", help="close the image at once; the guest sees I/O errors until it lets go"
    )
    replace = add("replace-disk", "DISK PATH ", _replace, "put another image in the place of a disk's, in use")
    replace.add_argument("--format", choices=FORMATS, help="the new image's format (default: raw)")
    replace.add_argument("--shrink", action="store_true", help="the new image may be smaller")
    resize = add("resize-disk", "DISK ", _resize, "change the size of a disk and its image, in use")
    resize.add_argument(
        "size", metavar="SIZE", nargs="?", help="bytes; K, M, G or T may follow (default: what the image has)"
    )
    resize.add_argument("--shrink", action="store_true", help="the disk may become smaller")
    _add_limit_options(add("limit-disk", "DISK ", _limit, "limit what the guest may ask of a disk"))
    insert = add("insert-media", "DISK PATH ", _insert, "put an image into an optical drive")
    insert.add_argument("--format", choices=FORMATS, help="the image's format (default: raw)")
    insert.add_argument("--force", action="store_true", help="even if the guest has locked the tray")
    eject = add("eject-media", "DISK ", _eject, "take the image out of an optical drive")
    eject.add_argument("--force", action="store_true", help="even if the guest has locked the tray")
    listing = add("list-disks", "", _list, "list a machine's disks")
    listing.add_argument("--stats", action="store_true", help="show what the guest reads and writes, over a second")


_ARGUMENTS = {"PATH": "an image or a block device; opened as you", "DISK": "the disk's name"}


def _add_attach_options(parser: argparse.ArgumentParser) -> None:
    parser.usage = "vmctl attach-disk MACHINE [PATH] [OPTION…]"
    next(action for action in parser._actions if action.dest == "path").nargs = "?"
    parser.add_argument(
        "--bus",
        choices=(*BUSES, AUTO_BUS),
        default=DEFAULT_BUS,
        help="how the guest sees it; auto: virtio-blk while there are ports, then virtio-scsi (default: %(default)s)",
    )
    parser.add_argument("--name", help="the disk's name (default: the file's name)")
    parser.add_argument("--format", choices=FORMATS, help="the image's format (default: raw)")
    parser.add_argument("--read-only", action="store_true", help="the guest may not write")
    parser.add_argument("--serial", help="the serial number that the guest sees (default: from the name)")
    parser.add_argument("--discard", choices=DISCARD_CHOICES, help="give back what the guest discards (default: unmap)")
    parser.add_argument("--detect-zeroes", choices=DETECT_ZEROES_CHOICES, help="what becomes of zeroes (default: off)")
    parser.add_argument("--cache", choices=CACHE_CHOICES, help="the host's page cache (default: writeback)")
    parser.add_argument("--aio", choices=AIO_CHOICES, help="how the host does the I/O (default: threads)")
    parser.add_argument("--iothread", action="store_true", help="an I/O thread of its own")
    parser.add_argument("--share", action="store_true", help="let other machines write to the image too")
    parser.add_argument(
        "--on-error",
        choices=ON_ERROR_CHOICES,
        help="where a request fails: tell the guest, stop it, or stop it if the host is full (default)",
    )
    parser.add_argument("--boot-index", metavar="N", type=int, help="its place in the boot order")
    _add_limit_options(parser)


def _add_limit_options(parser: argparse.ArgumentParser) -> None:
    for name, what in (("iops", "requests"), ("bps", "bytes")):
        for suffix, kind in (("", ""), ("-read", " read"), ("-write", " written")):
            parser.add_argument(f"--{name}{suffix}", metavar="N", help=f"{what}{kind} a second; K, M, G may follow")
    parser.add_argument(
        "--burst", metavar="FACTOR", type=_burst, help="so many times the limits for a second after a quiet time"
    )


def _burst(text: str) -> float:
    return number(text, 1, BURST_MAX, f"a factor from 1 to {BURST_MAX}")


def _limits(options: argparse.Namespace) -> dict[str, int]:
    """The limits that were given."""
    found = {}
    for key in ("iops", "iops_read", "iops_write", "bps", "bps_read", "bps_write"):
        if (text := getattr(options, key)) is not None:
            first, *rest = key.split("_")
            value = parse_size(text, option=f"--{key.replace('_', '-')}=", what="rate")
            found[first + "".join(map(str.capitalize, rest))] = value
    if options.burst is not None:
        if not found:
            raise UsageError("--burst= needs a limit", hint="add --iops= or --bps=")
        found["burstPercent"] = round(options.burst * 100)
    return found


# The verbs. Each raises VmspawnError if it did not happen.


def _say(options: argparse.Namespace, text: str) -> None:
    if not options.quiet and options.json == "off":
        print(printable(text))


def _answer(options: argparse.Namespace, reply: dict[str, Any], text: str) -> None:
    """Show a reply: as JSON for programs, in words for people."""
    if options.json != "off":
        print_json(reply, options.json)
    _say(options, text)


def _attach(options: argparse.Namespace) -> None:
    wanted: dict[str, Any] = {
        "name": options.name or default_name(options.path or ""),
        "bus": options.bus,
        "format": options.format,
        "readOnly": options.read_only,
        "serial": options.serial,
        "discard": options.discard,
        "detectZeroes": options.detect_zeroes,
        "cache": options.cache,
        "aio": options.aio,
        "thread": options.iothread,
        "share": options.share,
        "bootIndex": options.boot_index,
        "onError": options.on_error,
        "limits": _limits(options) or None,
    }
    if not options.path:
        if options.bus != "scsi-cd" or not options.name:
            raise UsageError("no image", hint="name a PATH; only --bus=scsi-cd --name=NAME can be without")
        with client_for(options) as client, context(f"cannot attach {options.name}"):
            return _say_attached(options, client.call(f"{MACHINE}.AttachStorage", wanted))
    with client_for(options) as client, context(f"cannot attach {options.path}"):
        read_only = is_only_read(options.bus, options.format, read_only=options.read_only)
        attached = _call_with_image(client, "AttachStorage", options.path, wanted, read_only=read_only)
    return _say_attached(options, attached)


def _say_attached(options: argparse.Namespace, attached: dict[str, Any]) -> None:
    mode = ", read-only" if attached["readOnly"] else ""
    _answer(
        options,
        attached,
        f"Attached {attached['name']} on {attached['bus']} at {attached['place']}{mode}: {attached['byId']}",
    )


def _call_with_image(
    client: Client, method: str, path: str, parameters: dict[str, Any], *, read_only: bool
) -> dict[str, Any]:
    """Open an image and pass it along."""
    backing = backings.open_disk(path, read_only=read_only)
    image = {"fileDescriptorIndex": 0, "path": utf8(os.path.abspath(path))}
    try:
        return client.call(f"{MACHINE}.{method}", {**image, **parameters}, fds=(backing.fd,))
    finally:
        backing.close()


def _detach(options: argparse.Namespace) -> None:
    timeout = _DETACH_TIMEOUT if options.timeout is None else options.timeout
    if options.no_wait:
        timeout = 0.0
    parameters = {"name": options.disk, "timeoutUSec": int(timeout * 1e6), "force": options.force}
    with context(f"cannot detach {options.disk}"):
        try:
            pending = _wait_for_detach(options, parameters, timeout)
        except VarlinkError as error:
            if not options.no_wait or error.leaf != "StoragePending":
                raise
            return _say(options, f"Detaching {options.disk}: {error}")
    if options.json != "off":
        print_json({"pending": pending}, options.json)
    elif pending:
        _say(
            options,
            f"Detached {options.disk} by force: its image is free. The guest sees errors until it lets go or is reset.",
        )
    else:
        _say(options, f"Detached {options.disk}")
    return None


def _wait_for_detach(options: argparse.Namespace, parameters: dict[str, Any], timeout: float) -> bool:
    """Call and wait; returns whether something is still pending. On a terminal it is shown what is waited for."""
    if options.quiet or timeout == 0 or not sys.stderr.isatty():
        with Client(options.machine, timeout=max(REPLY_TIMEOUT, timeout + _GRACE)) as client:
            return bool(client.call(f"{MACHINE}.DetachStorage", parameters)["pending"])
    with Client(options.machine, timeout=max(REPLY_TIMEOUT, timeout + _GRACE)) as client:
        client.begin(f"{MACHINE}.DetachStorage", parameters)
        with Client(options.machine) as observer:
            shown = False
            while not client.answered(within=1.0):
                disks = observer.call(f"{MACHINE}.ListStorage")["storage"]
                disk = next((disk for disk in disks if disk["name"] == options.disk), None)
                if disk and disk["removal"]:
                    _show_progress(disk)
                    shown = True
            if shown:
                print(file=sys.stderr)
        return bool(client.finish(f"{MACHINE}.DetachStorage")["pending"])


def _show_progress(disk: dict[str, Any]) -> None:
    removal = disk["removal"]
    asked = "once" if removal["requests"] == 1 else f"{removal['requests']} times"
    text = f"{removal['pendingUSec'] / 1e6:.0f} s, asked {asked}: {removal['reason']}"
    print(f"\r\033[K{text[: _columns() - 1]}", end="", file=sys.stderr, flush=True)


def _columns() -> int:
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or 80
    except OSError:
        return 80


def _replace(options: argparse.Namespace) -> None:
    with client_for(options) as client, context(f"cannot replace {options.disk}"):
        wanted = {
            "name": options.disk,
            "format": options.format,
            "shrink": options.shrink,
        }
        read_only = _disk(client, options.disk)["readOnly"]
        reply = _call_with_image(client, "ReplaceStorage", options.path, wanted, read_only=read_only)
    _answer(
        options, reply, f"Replaced the image of {options.disk} by {options.path}, {format_size(reply['sizeBytes'])}"
    )


def _disk(client: Client, name: str) -> dict[str, Any]:
    for disk in client.call(f"{MACHINE}.ListStorage")["storage"]:
        if disk["name"] == name:
            found: dict[str, Any] = disk
            return found
    raise VmspawnError(f"there is no disk named {name}", hint=f"see: vmctl list-disks {client.machine}")


def _resize(options: argparse.Namespace) -> None:
    size = None if options.size is None else parse_size(options.size, option="SIZE ")
    with client_for(options) as client, context(f"cannot resize {options.disk}"):
        wanted = {"name": options.disk, "sizeBytes": size, "shrink": options.shrink}
        reply = client.call(f"{MACHINE}.ResizeStorage", wanted)
    _answer(options, reply, f"Resized {options.disk} to {format_size(reply['sizeBytes'])}")


def _limit(options: argparse.Namespace) -> None:
    limits = _limits(options)
    with client_for(options) as client, context(f"cannot limit {options.disk}"):
        client.call(f"{MACHINE}.LimitStorage", {"name": options.disk, "limits": limits or None})
    _say(options, f"Limited {options.disk}" if limits else f"{options.disk} has no limits now")


def _insert(options: argparse.Namespace) -> None:
    with client_for(options) as client, context(f"cannot insert {options.path}"):
        wanted = {
            "name": options.disk,
            "format": options.format,
            "force": options.force,
        }
        _call_with_image(client, "InsertMedia", options.path, wanted, read_only=True)
    _say(options, f"Inserted {options.path} into {options.disk}")


def _eject(options: argparse.Namespace) -> None:
    with client_for(options) as client, context(f"cannot eject the medium of {options.disk}"):
        client.call(f"{MACHINE}.EjectMedia", {"name": options.disk, "force": options.force})
    _say(options, f"Ejected the medium of {options.disk}")


# Lists.


def _list(options: argparse.Namespace) -> None:
    with client_for(options) as client:
        if options.stats:
            return _list_statistics(options, client)
        disks = client.call(f"{MACHINE}.ListStorage")["storage"]
    columns = ("DISK", "BUS", "SIZE", "FORMAT", "MODE", "STATE", "PLACE", "SERIAL", "BY-ID", "LIMITS", "FILE")
    return show(options, disks, "disks", columns, _row, right=("SIZE",))


def _row(disk: dict[str, Any]) -> tuple[str, ...]:
    return (
        disk["name"],
        disk["bus"],
        format_size(disk["sizeBytes"]) if disk["sizeBytes"] else "-",
        disk["format"] if disk["sizeBytes"] else "-",
        "ro" if disk["readOnly"] else "rw",
        _state(disk),
        disk["place"],
        disk["serial"],
        disk["byId"].removeprefix("/dev/disk/by-id/"),
        _limits_text(disk["limits"]),
        disk["path"] or "-",
    )


def _state(disk: dict[str, Any]) -> str:
    if disk["boot"]:
        return "boot"
    removal = disk["removal"]
    if not removal:
        return str(disk["state"])
    forced = ", forced" if removal["forced"] else ""
    return f"{disk['state']} ({removal['pendingUSec'] / 1e6:.0f} s{forced})"


def _limits_text(limits: dict[str, int] | None) -> str:
    names = {"iops": "iops", "iopsRead": "iops-read", "iopsWrite": "iops-write"}
    names |= {"bps": "bps", "bpsRead": "bps-read", "bpsWrite": "bps-write"}
    words = [f"{name}={limits[key]}" for key, name in names.items() if limits and limits.get(key)]
    return ",".join(words) or "-"


def _list_statistics(options: argparse.Namespace, client: Client) -> None:
    """Two looks, a second apart: all since the disks were attached, and what came in between."""
    before = _statistics(client)
    start = time.monotonic()
    time.sleep(_STATISTICS_SECONDS)
    after = _statistics(client)
    seconds = time.monotonic() - start
    found = [
        {"name": name, **now, "perSecond": {key: (now[key] - before[name][key]) / seconds for key in now}}
        for name, now in after.items()
        if name in before
    ]
    columns = ("DISK", "READS", "READ", "WRITES", "WRITTEN", "FLUSHES", "FAILED", "READ/s", "WRITTEN/s", "IOPS")
    show(options, found, "disks", columns, _statistics_row, right=columns[1:])


def _statistics(client: Client) -> dict[str, dict[str, int]]:
    disks = client.call(f"{MACHINE}.ListStorage", {"statistics": True})["storage"]
    return {disk["name"]: disk["statistics"] for disk in disks if disk["statistics"]}


def _statistics_row(disk: dict[str, Any]) -> tuple[str, ...]:
    per_second = disk["perSecond"]
    return (
        disk["name"],
        str(disk["reads"]),
        format_size(disk["readBytes"]),
        str(disk["writes"]),
        format_size(disk["writtenBytes"]),
        str(disk["flushes"]),
        str(disk["failed"]),
        format_size(round(per_second["readBytes"])),
        format_size(round(per_second["writtenBytes"])),
        f"{per_second['reads'] + per_second['writes']:.0f}",
    )
