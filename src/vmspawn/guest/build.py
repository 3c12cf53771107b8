# SPDX-License-Identifier: LGPL-2.1-or-later
"""Builds the built-in guest: a kernel, and an initramfs with busybox, kernel modules and vmspawn's scripts."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from ..agent.build import build as build_agent
from ..errors import GuestError, StartError
from . import builtin
from .builtin import BuiltinGuest
from .busybox import find_busybox
from .initramfs import Initramfs
from .kernel import Kernel, find_kernel
from .modules import modules_alias, modules_dep
from .packages import Fetcher

#: Modules that are loaded at boot, in this order, those for the console first. Some kernels have some of them built in.
BOOT_MODULES = (
    "virtio_pci",
    "virtio_console",
    "virtio_blk",
    "nvme",
    "virtio_scsi",
    "sd_mod",
    "sr_mod",
    "evdev",
    "button",
    "gpio_keys",
    "i8042",
    "atkbd",
    "virtio_input",
    "pvpanic_pci",
    "vmgenid",
)

#: Modules that are loaded when they are needed: for file systems that a user may mount, and for a network card.
EXTRA_MODULES = ("crc32c_generic", "ext4", "isofs", "virtio_net", "af_packet", "virtiofs", "overlay")

_DIRECTORIES = ("bin", "sbin", "usr/bin", "usr/sbin", "dev", "mnt", "proc", "root", "run", "sys", "tmp")

#: The age in seconds at which the scratch directory of a killed build is removed.
_STALE_SECONDS = 3600
#: The time in seconds since its last use after which the guest of another version is removed: 30 days.
_UNUSED_SECONDS = 30 * 24 * 3600
_SCRATCH_PREFIX = ".new-"


def build(architecture: str = "x86_64", on_progress: Callable[[str], None] = lambda phrase: None) -> BuiltinGuest:
    """Return the guest from the cache. Build it if the cache does not contain it.

    `on_progress` is called with a short phrase for users at each step. Builds may run in parallel: each publishes its
    guest atomically, and the first guest stays. A failed build leaves nothing behind.
    """
    if architecture not in builtin.ARGUMENTS:
        raise GuestError(
            f"there is no built-in guest for {architecture}",
            hint=f"there is one for {' and '.join(builtin.ARGUMENTS)}",
        )
    cache = Path(builtin.cache_directory())
    try:
        return builtin.find(architecture) or _build(architecture, cache, on_progress)
    except OSError as error:
        raise GuestError(
            f"cannot build the guest in {cache}: {error.strerror}",
            hint="set VMSPAWN_CACHE_DIR to another directory",
        ) from error


def _build(architecture: str, cache: Path, on_progress: Callable[[str], None]) -> BuiltinGuest:
    cache.mkdir(parents=True, exist_ok=True)
    agent = _agent(architecture, on_progress)
    name = builtin.name(architecture, agent=agent is not None)
    if agent is None and (guest := builtin.guest_in(str(cache / name), architecture)):
        return guest
    with tempfile.TemporaryDirectory(prefix=_SCRATCH_PREFIX, dir=cache) as scratch:
        fetcher = Fetcher(architecture, Path(scratch), on_progress)
        kernel = find_kernel(architecture, fetcher, on_progress)
        busybox = find_busybox(architecture, fetcher)
        new = Path(scratch, "guest")
        new.mkdir()
        on_progress("Writing the initramfs")
        shutil.copyfile(kernel.image, new / "kernel")
        with open(new / "initrd", "wb") as file:
            write_initramfs(Initramfs(file), kernel, busybox, agent)
        for file_name in ("kernel", "initrd"):
            _sync(new / file_name)
        guest = _publish(new, cache / name, architecture)
    _remove_old(cache, guest, architecture)
    return guest


def _agent(architecture: str, on_progress: Callable[[str], None]) -> bytes | None:
    """Return the compiled agent, or None if it cannot be compiled. A guest without the agent cannot run commands."""
    try:
        return Path(build_agent(architecture)).read_bytes()
    except StartError as error:
        on_progress(f"The guest has no agent, so no commands can be run in it: {error}; {error.hint}")
        return None


def write_initramfs(archive: Initramfs, kernel: Kernel, busybox: bytes, agent: bytes | None = None) -> None:
    """Write all files of the guest except its kernel."""
    for directory in _DIRECTORIES:
        archive.add_directory(directory)
    # The kernel opens /dev/console for PID 1 before anything is mounted.
    archive.add_character_device("dev/console", 5, 1)
    archive.add_file("bin/busybox", busybox, executable=True)
    archive.add_link("bin/sh", "busybox")
    if agent is not None:
        archive.add_file("lib/vmspawn/agent", agent, executable=True)
    for name in builtin.FILES:
        content = Path(builtin.ROOTFS, name).read_bytes()
        archive.add_file(name, content, executable=content.startswith(b"#!"))
    _add_modules(archive, kernel)
    archive.close()


def _add_modules(archive: Initramfs, kernel: Kernel) -> None:
    modules = kernel.modules.load((*BOOT_MODULES, *EXTRA_MODULES))
    directory = f"lib/modules/{kernel.modules.version}"
    for module in modules.values():
        archive.add_file(f"{directory}/{module.name}.ko", module.content)
    archive.add_file(f"{directory}/modules.dep", modules_dep(modules).encode())
    archive.add_file(f"{directory}/modules.alias", modules_alias(modules).encode())
    archive.add_file("etc/modules", "".join(f"{name}\n" for name in BOOT_MODULES if name in modules).encode())


def _publish(new: Path, final: Path, architecture: str) -> BuiltinGuest:
    """Rename the guest to its final path, unless another build has published one there."""
    if builtin.guest_in(str(final), architecture) is None:
        shutil.rmtree(final, ignore_errors=True)
        try:
            new.rename(final)
        except OSError:
            if builtin.guest_in(str(final), architecture) is None:
                raise
    guest = builtin.guest_in(str(final), architecture)
    assert guest is not None
    return guest


def _remove_old(cache: Path, guest: BuiltinGuest, architecture: str) -> None:
    """Remove the scratch directories of killed builds, and unused guests of other versions of this package.

    Guests that were used recently are kept, because a snapshot of a running machine needs the files that the machine
    was started with.
    """
    for directory in cache.iterdir():
        is_scratch = directory.name.startswith(_SCRATCH_PREFIX)
        if is_scratch or (directory.name.startswith(f"{architecture}-") and directory != Path(guest.kernel).parent):
            # Another build may remove it at the same time.
            with contextlib.suppress(FileNotFoundError):
                age = time.time() - directory.stat().st_mtime
                if age > (_STALE_SECONDS if is_scratch else _UNUSED_SECONDS):
                    shutil.rmtree(directory, ignore_errors=True)


def _sync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file)
