# SPDX-License-Identifier: LGPL-2.1-or-later
"""Implements the verbs that attach, detach and change disks."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from typing import Any

from ...control.client import REPLY_TIMEOUT, Client, VarlinkError
from ...errors import NoSuchStorage, UsageError, VmspawnError
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
from ...storage.limits import BURST_MAX
from ...text import printable
from ...timeouts import DETACH_TIMEOUT, DRIVER_TIMEOUT
from ..parser import Parser
from ..tables import format_size, print_json, terminal_width
from ..values import number, parse_size, position
from .images import add_format, add_path, call_with_image
from .replies import MACHINE, answer, client_for, client_waiting_for_guest, failing_to, say
from .verbs import Verbs, add_disk, disk_name


def add(verbs: Verbs) -> None:
    """Add the verbs."""
    attach = verbs.add_for_machine("attach-disk", _attach, "attach a disk to a running machine", "[PATH]")
    add_path(attach, nargs="?")
    _add_attach_options(attach)
    detach = verbs.add_for_machine("detach-disk", _detach, "detach a disk from a running machine", "DISK")
    add_disk(detach)
    detach.add_argument("--no-wait", action="store_true", help="ask the guest and return at once")
    detach.add_argument(
        "--force",
        action="store_true",
        help="take the image away now; the guest gets I/O errors until it releases the disk",
    )
    replace = verbs.add_for_machine("replace-disk", _replace, "replace the image of a disk in use", "DISK PATH")
    add_disk(replace)
    add_path(replace)
    add_format(replace)
    replace.add_argument("--shrink", action="store_true", help="allow a smaller image")
    resize = verbs.add_for_machine("resize-disk", _resize, "resize a disk in use, and its image", "DISK [SIZE]")
    add_disk(resize)
    resize.add_argument(
        "size",
        metavar="SIZE",
        nargs="?",
        help="bytes, with K, M, G or T; +SIZE is relative to the current size (default: the image's size)",
    )
    resize.add_argument("--shrink", action="store_true", help="allow the disk to become smaller")
    limit = verbs.add_for_machine("limit-disk", _limit, "limit the I/O of a disk; without limits, remove them", "DISK")
    add_disk(limit)
    _add_limit_options(limit)


def _add_attach_options(parser: Parser) -> None:
    parser.add_argument(
        "--bus",
        choices=(*BUSES, AUTO_BUS),
        default=DEFAULT_BUS,
        help="bus the disk is attached to; auto: virtio-blk while ports are free, then virtio-scsi "
        "(default: %(default)s)",
    )
    parser.add_argument("--name", type=disk_name, help="name of the disk (default: the file's name)")
    add_format(parser)
    parser.add_argument("--read-only", action="store_true", help="deny writes by the guest")
    parser.add_argument("--serial", help="serial number in the guest (default: from the name)")
    parser.add_argument("--discard", choices=DISCARD_CHOICES, help="effect of a discard (default: unmap)")
    parser.add_argument(
        "--detect-zeroes", choices=DETECT_ZEROES_CHOICES, help="treatment of written zeroes (default: off)"
    )
    parser.add_argument("--cache", choices=CACHE_CHOICES, help="use of the host's page cache (default: writeback)")
    parser.add_argument("--aio", choices=AIO_CHOICES, help="the host's interface for I/O (default: threads)")
    parser.add_argument("--iothread", action="store_true", help="give the disk its own I/O thread")
    parser.add_argument("--share", action="store_true", help="allow other machines to open the image for writing")
    parser.add_argument(
        "--on-error",
        choices=ON_ERROR_CHOICES,
        help="reaction to a failed request: report it to the guest, stop the guest, or stop the guest only if the "
        "host's disk is full (default)",
    )
    parser.add_argument(
        "--wait-guest",
        action="store_true",
        help="wait until the guest uses the disk (30 s, or --timeout=)",
    )
    parser.add_argument("--boot-index", metavar="N", type=position, help="position in the boot order; 0 is the first")
    _add_limit_options(parser)


#: Descriptions of what the limits count: all, reads, writes.
_LIMITED = {
    "iops": ("requests", "read requests", "write requests"),
    "bps": ("bytes", "bytes read", "bytes written"),
}


def _add_limit_options(parser: Parser) -> None:
    for name, kinds in _LIMITED.items():
        for suffix, kind in zip(("", "-read", "-write"), kinds, strict=True):
            parser.add_argument(f"--{name}{suffix}", metavar="N", help=f"limit {kind} per second; with K, M or G")
    parser.add_argument(
        "--burst", metavar="FACTOR", type=_burst, help="allow FACTOR times the limits for a second after a quiet time"
    )


def _burst(text: str) -> float:
    return number(text, 1, BURST_MAX, f"a factor from 1 to {BURST_MAX}")


def _limits(options: argparse.Namespace) -> dict[str, int]:
    """Return the limits in the options. Raises UsageError."""
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
    if options.wait_guest:
        wanted["waitGuestUSec"] = int((DRIVER_TIMEOUT if options.timeout is None else options.timeout) * 1e6)
    if not options.path:
        if options.bus != "scsi-cd" or not options.name:
            raise UsageError(
                "no image", hint="add a PATH; only an optical drive (--bus=scsi-cd --name=NAME) may be empty"
            )
        with _attaching_client(options) as client, failing_to("attach", options.name):
            return _say_attached(options, client.call(f"{MACHINE}.AttachStorage", wanted))
    with _attaching_client(options) as client, failing_to("attach", options.path):
        read_only = is_only_read(options.bus, options.format, read_only=options.read_only)
        attached = call_with_image(client, "AttachStorage", options.path, wanted, read_only=read_only)
    return _say_attached(options, attached)


def _attaching_client(options: argparse.Namespace) -> Client:
    """Connect to the machine, with a timeout that includes the wait for the guest."""
    if not options.wait_guest:
        return client_for(options)
    return client_waiting_for_guest(options, DRIVER_TIMEOUT)


def _say_attached(options: argparse.Namespace, attached: dict[str, Any]) -> None:
    mode = ", read-only" if attached["readOnly"] else ""
    answer(
        options,
        attached,
        f"Attached {attached['name']} on {attached['bus']} at {attached['place']}{mode}: {attached['byId']}",
    )


def _detach(options: argparse.Namespace) -> None:
    timeout = DETACH_TIMEOUT if options.timeout is None else options.timeout
    if options.no_wait:
        timeout = 0.0
    parameters = {"name": options.disk, "timeoutUSec": int(timeout * 1e6), "force": options.force}
    with failing_to("detach", options.disk):
        with Client(options.machine) as client:
            disk = _find(client, options.disk)
        try:
            pending = _wait_for_detach(options, parameters, timeout)
        except VarlinkError as error:
            if not options.no_wait or error.leaf != "StoragePending":
                raise
            return say(options, f"Detaching {options.disk}: {error}")
    if options.json != "off":
        print_json({"pending": pending}, options.json)
    elif pending:
        say(
            options,
            f"Detached {options.disk} by force: the image is closed. "
            "The guest gets I/O errors until it releases the disk.",
        )
    else:
        say(options, f"Detached {options.disk}")
    if disk is not None:
        _say_where_data_is(options, disk)
    return None


def _say_where_data_is(options: argparse.Namespace, disk: dict[str, Any]) -> None:
    """Report the overlay that has the newest data of a disk that was detached, or of an image that was replaced."""
    if options.json == "off" and disk["backingFiles"] and not disk["readOnly"]:
        say(options, f"{options.disk}: {_newest_data(options.machine, disk)}")


def _newest_data(machine: str, disk: dict[str, Any]) -> str:
    """Return a line about the overlay of a disk that was detached, or of an image that was replaced.

    A disk has an overlay after a snapshot of its machine, and in a copy.
    """
    if disk["path"] is None:
        return "the guest's changes are discarded, because this machine is a copy whose disks are not kept"
    image = disk["backingFiles"][-1]
    if _is_of_copy(disk["path"]):
        return f"the newest data is in {disk['path']}; it is never written to {image}, because this machine is a copy"
    written = f"it is written to {image} when {machine} has ended and its snapshots are removed"
    return f"the newest data is in {disk['path']}; {written}"


def _is_of_copy(overlay: str) -> bool:
    """Return whether an overlay belongs to a copy. Returns False if the manifest beside the overlay is unreadable."""
    from ...snapshots.directory import OpenSnapshot

    parent, full_name = os.path.split(os.path.dirname(overlay))
    with contextlib.suppress(VmspawnError), contextlib.closing(OpenSnapshot(full_name, parent)) as current:
        return current.manifest.is_copy
    return False


def _find(client: Client, name: str) -> dict[str, Any] | None:
    found = client.call(f"{MACHINE}.ListStorage")["storage"]
    return next((each for each in found if each["name"] == name), None)


def _detaching_client(options: argparse.Namespace, timeout: float) -> Client:
    """Connect to the machine, with a timeout that includes the wait for the guest.

    With --force, that wait begins only after the host's storage has answered all requests.
    """
    if options.force:
        return Client(options.machine, timeout=REPLY_TIMEOUT + timeout)
    return client_waiting_for_guest(options, timeout)


def _wait_for_detach(options: argparse.Namespace, parameters: dict[str, Any], timeout: float) -> bool:
    """Call DetachStorage and wait, with progress on a terminal. Returns whether the removal is still pending."""
    if options.quiet or timeout == 0 or not sys.stderr.isatty():
        with _detaching_client(options, timeout) as client:
            return bool(client.call(f"{MACHINE}.DetachStorage", parameters)["pending"])
    with _detaching_client(options, timeout) as client:
        client.begin(f"{MACHINE}.DetachStorage", parameters)
        with Client(options.machine) as observer:
            shown = False
            while not client.is_answered(within=1.0):
                disk = _find(observer, options.disk)
                if disk and disk["removal"]:
                    _show_progress(disk)
                    shown = True
            if shown:
                print(file=sys.stderr)
        return bool(client.finish(f"{MACHINE}.DetachStorage")["pending"])


def _show_progress(disk: dict[str, Any]) -> None:
    removal = disk["removal"]
    asked = "once" if removal["requests"] == 1 else f"{removal['requests']} times"
    text = printable(f"{removal['pendingUSec'] / 1e6:.0f} s, asked {asked}: {removal['reason']}")
    print(f"\r\033[K{text[: terminal_width(sys.stderr.fileno()) - 1]}", end="", file=sys.stderr, flush=True)


def _replace(options: argparse.Namespace) -> None:
    with client_for(options) as client, failing_to("replace", options.disk):
        wanted = {
            "name": options.disk,
            "format": options.format,
            "shrink": options.shrink,
        }
        disk = _disk(client, options.disk)
        reply = call_with_image(client, "ReplaceStorage", options.path, wanted, read_only=disk["readOnly"])
    answer(options, reply, f"Replaced the image of {options.disk} by {options.path}, {format_size(reply['sizeBytes'])}")
    _say_where_data_is(options, disk)


def _disk(client: Client, name: str) -> dict[str, Any]:
    disk = _find(client, name)
    if disk is None:
        raise NoSuchStorage(f"there is no disk named {name}", hint=f"see: vmctl list-disks {client.machine}")
    return disk


def _resize(options: argparse.Namespace) -> None:
    text = options.size
    size = None if text is None else parse_size(text.removeprefix("+"), option="SIZE ")
    with client_for(options) as client, failing_to("resize", options.disk):
        if size is not None and text.startswith("+"):
            size += _disk(client, options.disk)["sizeBytes"]
        wanted = {"name": options.disk, "sizeBytes": size, "shrink": options.shrink}
        reply = client.call(f"{MACHINE}.ResizeStorage", wanted)
    answer(options, reply, f"Resized {options.disk} to {format_size(reply['sizeBytes'])}")


def _limit(options: argparse.Namespace) -> None:
    limits = _limits(options)
    with client_for(options) as client, failing_to("limit", options.disk):
        client.call(f"{MACHINE}.LimitStorage", {"name": options.disk, "limits": limits or None})
    say(options, f"Limited {options.disk}" if limits else f"{options.disk} has no limits now")
