# SPDX-License-Identifier: LGPL-2.1-or-later
"""Finds the built-in guest, a kernel and an initramfs that `build` makes once, in the cache.

This module is on the start path and imports next to nothing.
"""

from __future__ import annotations

import os

from .. import cache

#: Goes up whenever the same files below `rootfs` would make another guest.
FORMAT = 2

#: What the initramfs takes from this package as it is, by its path below `rootfs` and in the guest alike.
ROOTFS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "rootfs")
FILES = (
    "init",
    "etc/filesystems",
    "etc/group",
    "etc/mdev.conf",
    "etc/modprobe.conf",
    "etc/passwd",
    "etc/profile",
    "lib/vmspawn/block",
    "lib/vmspawn/button",
    "lib/vmspawn/console",
    "lib/vmspawn/functions",
    "lib/vmspawn/window",
)

#: The sources of the agent, which the initramfs takes compiled.
_AGENT = os.path.join(os.path.dirname(os.path.dirname(ROOTFS)), "agent")
_AGENT_FILES = ("agent.c", "kernel.h")

#: Kernel arguments. Under TCG the self-tests of the kernel's ciphers take 0.4 s, patching its locks for a single CPU
#: 0.2 s and page tables apart from the kernel's 0.2 s; on a busy host the check of the timer may fail and panic.
ARGUMENTS = {
    "x86_64": ("quiet", "panic=-1", "cryptomgr.notests", "noreplace-smp", "no_timer_check"),
    "aarch64": ("quiet", "panic=-1", "cryptomgr.notests", "kpti=off"),
}

_PRIME = 2**64 - 59


class BuiltinGuest(tuple[str, str, tuple[str, ...]]):
    """The files and kernel arguments of the guest. The caller adds `console=` to the arguments."""

    __slots__ = ()

    def __new__(cls, kernel: str, initrd: str, arguments: tuple[str, ...]) -> BuiltinGuest:
        return super().__new__(cls, (kernel, initrd, arguments))

    @property
    def kernel(self) -> str:
        """The absolute path of the kernel image."""
        return self[0]

    @property
    def initrd(self) -> str:
        """The absolute path of the initramfs."""
        return self[1]

    @property
    def arguments(self) -> tuple[str, ...]:
        """The kernel arguments of this guest."""
        return self[2]


def find(architecture: str = "x86_64") -> BuiltinGuest | None:
    """Find the guest in the cache; returns None if it has to be built."""
    return guest_in(os.path.join(cache_directory(), name(architecture)), architecture)


def name(architecture: str, *, agent: bool = True) -> str:
    """The name of a guest's directory in the cache. Without a compiler, there is a guest without the agent."""
    return f"{architecture}-{fingerprint()}{'' if agent else '-no-agent'}"


def guest_in(directory: str, architecture: str) -> BuiltinGuest | None:
    """Return the guest whose files are in a directory, or None if one is missing."""
    kernel, initrd = os.path.join(directory, "kernel"), os.path.join(directory, "initrd")
    if os.path.exists(kernel) and os.path.exists(initrd):
        return BuiltinGuest(kernel, initrd, ARGUMENTS.get(architecture, ()))
    return None


def cache_directory() -> str:
    """Return the absolute path of the directory with the guests of all architectures, whether it exists or not."""
    return os.path.join(cache.cache_directory(), "guest")


def fingerprint() -> str:
    """A short name for what is in `rootfs`: another version of this package must not find the guest of this one.

    The remainder by a prime tells files apart well enough, and hashlib would take longer to import than all this.
    """
    value = FORMAT
    paths = [os.path.join(ROOTFS, name) for name in FILES] + [os.path.join(_AGENT, name) for name in _AGENT_FILES]
    for path in paths:
        with open(path, "rb") as file:
            value = int.from_bytes(b"%x %b" % (value, file.read()), "big") % _PRIME
    return f"{value:016x}"
