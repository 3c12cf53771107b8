# SPDX-License-Identifier: LGPL-2.1-or-later
"""Shares directories of the host with the guest over virtiofs: as its root, or at mount points below it.

A separate virtiofsd serves each directory, and QEMU is connected to it from the start. systemd in the guest
mounts the shares: it gets lines for its fstab as a credential.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from ..aio.sockets import listen
from ..errors import StartError
from ..helpers.helper import Helper
from ..host.runtime import MachineDirectory
from ..host.spawn import spawn
from ..hotplug.places import Layout, Place
from ..record import Record
from .extras import Extras, Owned, join, take_place

if TYPE_CHECKING:
    from ..helpers.virtiofsd import Virtiofsd

#: The tag of the root, and the kernel arguments with which the guest mounts it, as in systemd-vmspawn.
ROOT_TAG = "root"
ROOT_ARGUMENTS = ("root=root", "rootfstype=virtiofs", "rw")

#: The credential that systemd in the guest adds to its /etc/fstab.
FSTAB_CREDENTIAL = "fstab.extra"

#: virtiofsd's default; QEMU's default is smaller.
_QUEUE_SIZE = 1024


class Share(Record):
    """A directory of the host, and its mount point in the guest. Both paths are absolute.

        vmspawn.Machine(image="debian.raw", binds=[Share("/srv/data", "/mnt/data", read_only=True)])

    systemd in the guest mounts it over virtiofs.
    """

    source: str
    target: str
    read_only: bool = False


def fstab(shares: tuple[Share, ...]) -> bytes:
    """Return the lines of fstab(5) with which the guest mounts the shares, in the order of their tags."""
    lines = (
        f"{_tag(number)} {_escape(each.target)} virtiofs {'ro' if each.read_only else 'rw'},x-initrd.mount\n"
        for number, each in enumerate(shares)
    )
    return os.fsencode("".join(lines))


def _tag(number: int) -> str:
    return f"mnt{number}"


def _escape(path: str) -> str:
    """Escape a path for fstab(5): white space and the backslash become octal codes."""
    return "".join(f"\\{ord(each):03o}" if each in " \t\n\\" else each for each in path)


def start(
    directory: str | None,
    shares: tuple[Share, ...],
    runtime: MachineDirectory,
    layout: Layout,
    notice: Callable[[str], None],
    owned: Owned,
) -> Extras:
    """Start a virtiofsd for the root and for each share. Returns the devices that are connected to them.

    Raises StartError.
    """
    from ..helpers import virtiofsd

    wanted = dict(_wanted(directory, shares))
    program = virtiofsd.find()
    parts = [Extras(kernel_arguments=ROOT_ARGUMENTS if directory is not None else ())]
    for tag, share in wanted.items():
        if share.read_only and not program.can_refuse_writes:
            notice(f"{program.path} cannot refuse writes: only the guest's mount of {share.source} is read-only")
        connected, helper = _serve(program, share, tag, runtime, owned)
        parts.append(_device(tag, connected, take_place(layout))._replace(helpers=(helper,)))
    return join(*parts)


def _wanted(directory: str | None, shares: tuple[Share, ...]) -> Iterator[tuple[str, Share]]:
    """Yield the shares by their tags, the root first. Raises StartError."""
    if directory is not None:
        check("directory", directory)
        yield ROOT_TAG, Share(directory, "/")
    for number, each in enumerate(shares):
        check("binds", each.source)
        yield _tag(number), each


def check(field: str, path: str) -> None:
    """Raise StartError if the path of a field is not a directory that vmspawn can open."""
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
    except OSError as error:
        template = "cannot use {" + field + "={path}}: {reason}"
        raise StartError.with_fields(template, path=path, reason=error.strerror) from None


def _serve(program: Virtiofsd, share: Share, tag: str, runtime: MachineDirectory, owned: Owned) -> tuple[int, Helper]:
    """Start a listening virtiofsd. Returns a connection to virtiofsd, for QEMU, and the process."""
    name = f"virtiofs-{tag}"
    address = runtime.socket_address(name)
    with listen(address, 1) as listener:
        # The connection waits until virtiofsd accepts it; the socket's name is not needed any more.
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connected:
            connected.connect(address)
            os.unlink(runtime.file(name))
            fd = owned.lend(connected.detach())
        command = program.command(share.source, listener.fileno(), read_only=share.read_only)
        helper = _spawn(command, listener.fileno(), f"served {share.source} to the guest")
        owned.undo.callback(helper.close)
    return fd, helper


def _spawn(command: list[str], listener: int, what: str) -> Helper:
    log = os.memfd_create("vmspawn-virtiofsd-log", os.MFD_CLOEXEC)
    try:
        return Helper("virtiofsd", what, spawn(command, keep=[listener], log=log), log)
    except BaseException:
        os.close(log)
        raise


def _device(tag: str, connected: int, place: Place) -> Extras:
    device = {
        "driver": "vhost-user-fs-pci",
        "id": f"virtiofs-{tag}",
        "chardev": f"virtiofs-{tag}-socket",
        "tag": tag,
        "queue-size": _QUEUE_SIZE,
        **place.properties(),
    }
    chardev = ("-chardev", f"socket,id=virtiofs-{tag}-socket,fd={connected}")
    return Extras(arguments=(*chardev, "-device", json.dumps(device)), descriptors=(connected,))
