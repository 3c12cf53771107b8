# SPDX-License-Identifier: LGPL-2.1-or-later
"""Finds the reason why QEMU cannot listen on a port of this host, and the process that uses the port."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

from . import runtime

#: The states of a listening TCP socket and of a bound UDP socket, as the kernel's tcp_states.h numbers them.
_LISTENS = {"tcp": "0A", "udp": "07"}

_TYPES = {"tcp": socket.SOCK_STREAM, "udp": socket.SOCK_DGRAM}

_ANY = "00000000"


def bind_error(protocol: str, address: str, port: int) -> int:
    """Return the errno with which the kernel refuses the port, or 0 if it is free."""
    with socket.socket(socket.AF_INET, _TYPES[protocol]) as probe:
        # Lingering connections of an earlier listener do not prevent QEMU from listening.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, protocol == "tcp")
        try:
            probe.bind((address, port))
            if protocol == "tcp":
                probe.listen()
        except OSError as error:
            return error.errno or 0
    return 0


def holder(protocol: str, address: str, port: int) -> str:
    """Describe the user of a port: `process 7 (nginx)` or `machine demo`; an empty string if no user is found."""
    inodes = set(_inodes(protocol, address, port))
    for pid in filter(str.isdecimal, os.listdir("/proc") if inodes else ()):
        if _has_socket(pid, inodes):
            return _machine(int(pid)) or f"process {pid} ({_name(pid)})"
    return ""


def _inodes(protocol: str, address: str, port: int) -> Iterator[str]:
    """Yield the inodes of the sockets that use the port on this address, or on all addresses."""
    for family in ("", "6"):
        try:
            with open(f"/proc/net/{protocol}{family}") as table:
                rows = [line.split() for line in table][1:]
        except OSError:
            continue
        for row in rows:
            found, _, number = row[1].rpartition(":")
            if int(number, 16) == port and row[3] == _LISTENS[protocol] and _overlap(found, address):
                yield row[9]


def _overlap(found: str, address: str) -> bool:
    """Return whether an address of the kernel's table, whose bytes are reversed, overlaps another address."""
    ours = socket.inet_aton(address)[::-1].hex().upper()
    return ours == _ANY or not found.strip("0") or found.endswith(ours)


def _has_socket(pid: str, inodes: set[str]) -> bool:
    folder = f"/proc/{pid}/fd"
    try:
        descriptors = os.listdir(folder)
    except OSError:
        # The process belongs to another user, or has ended.
        return False
    return any(_link(f"{folder}/{fd}") == f"socket:[{inode}]" for fd in descriptors for inode in inodes)


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""


def _machine(pid: int) -> str:
    names = (name for name in runtime.machine_names() if pid == _qemu_of(name))
    return next((f"machine {name}" for name in names), "")


def _qemu_of(machine: str) -> int:
    return runtime.running_qemu(os.path.join(runtime.runtime_root(), machine))


def _name(pid: str) -> str:
    try:
        with open(f"/proc/{pid}/comm", errors="replace") as file:
            return file.read().strip()
    except OSError:
        return "ended"
