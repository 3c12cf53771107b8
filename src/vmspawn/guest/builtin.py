# SPDX-License-Identifier: LGPL-2.1-or-later
"""Finds the built-in guest in the cache: a kernel and an initramfs, which `build` writes once.

Each start imports this module, so it imports very little.
"""

from __future__ import annotations

import contextlib
import os

from .. import cache
from ..fingerprint import fingerprint_files

#: The version of the build. Increase it if a build makes a different guest from the same files.
FORMAT = 3

#: Files that are copied to the initramfs, with the same paths below `rootfs` as in the guest.
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
    "lib/vmspawn/dhcp",
    "lib/vmspawn/functions",
    "lib/vmspawn/window",
)

#: The files that the compiled agent in the initramfs depends on (as in agent/build.py).
_AGENT = os.path.join(os.path.dirname(os.path.dirname(ROOTFS)), "agent")
_AGENT_FILES = ("agent.c", "kernel.h", "compiler.py")

#: Kernel arguments. Most of them skip work that is slow under TCG: self-tests of ciphers (0.4 s), patching locks for a
#: single CPU (0.2 s), page-table isolation (0.2 s), and zeroing allocated memory. Debian's kernel zeroes memory by
#: default, which takes a sixth of the processor time while a command's output is transferred. no_timer_check skips the
#: timer check, which may panic on a busy host.
ARGUMENTS = {
    "x86_64": ("quiet", "panic=-1", "cryptomgr.notests", "noreplace-smp", "no_timer_check", "init_on_alloc=0"),
    "aarch64": ("quiet", "panic=-1", "cryptomgr.notests", "kpti=off"),
}


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
    """Find the guest in the cache, and record that it is used; returns None if it has to be built."""
    directory = os.path.join(cache_directory(), name(architecture))
    guest = guest_in(directory, architecture)
    if guest is not None:
        with contextlib.suppress(OSError):
            os.utime(directory)
    return guest


def name(architecture: str, *, agent: bool = True) -> str:
    """Return the name of a guest's directory in the cache. Without a compiler, the guest has no agent."""
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
    """Return a short hash of the guest's and the agent's files. A version with other files builds another guest."""
    paths = [os.path.join(ROOTFS, name) for name in FILES] + [os.path.join(_AGENT, name) for name in _AGENT_FILES]
    return fingerprint_files(paths, FORMAT)
