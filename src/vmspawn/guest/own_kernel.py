# SPDX-License-Identifier: LGPL-2.1-or-later
"""Prepares the built-in guest for a user's kernel: adds the kernel's modules, and reports options that it lacks.

A kernel unpacks several initrds in turn. So the built-in guest's initrd stays unchanged, and a second initrd has the
modules and the list of modules to load.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from pathlib import Path

from ..errors import GuestError, StartError
from .build import BOOT_MODULES, EXTRA_MODULES
from .initramfs import Initramfs
from .modules import Module, Modules, modules_alias, modules_dep

#: Modules for mounting a directory of the host as the commands' root directory.
USERLAND_MODULES = ("virtiofs", "overlay")

#: Options without which the built-in guest does not start; none of them can be a module.
_NEEDED = (
    *("CONFIG_BLK_DEV_INITRD", "CONFIG_BINFMT_ELF", "CONFIG_BINFMT_SCRIPT", "CONFIG_PROC_FS", "CONFIG_SYSFS"),
    *("CONFIG_DEVTMPFS", "CONFIG_TMPFS", "CONFIG_PCI"),
)

#: Options without which no commands can be run, with their modules.
_FOR_COMMANDS = {"CONFIG_VIRTIO_PCI": "virtio_pci", "CONFIG_VIRTIO_CONSOLE": "virtio_console"}

_FOR_USERLAND = {"CONFIG_FUSE_FS": "fuse", "CONFIG_VIRTIO_FS": "virtiofs"}
_FOR_OVERLAY = {"CONFIG_OVERLAY_FS": "overlay"}


def find_modules(directory: str | None, version: str) -> Modules | None:
    """Return a kernel's modules: those in the user's directory, or else the installed ones, or None.

    The directory has the modules of one kernel (`/lib/modules/6.1.0`), was the INSTALL_MOD_PATH of `make
    modules_install`, or is the kernel's build tree. Raises StartError if it has no modules.
    """
    if directory is None:
        installed = Path("/lib/modules", version)
        return Modules(installed) if version and installed.is_dir() else None
    if not os.path.isdir(directory):
        raise StartError.with_fields("{modules={path}} is not a directory", path=directory)
    candidates = [Path(directory), Path(directory, "lib/modules", version)]
    for each in candidates if version else candidates[:1]:
        if each.joinpath("kernel").is_dir() or each.joinpath("modules.order").exists():
            return Modules(each, version=version or each.name)
    raise StartError.with_fields(
        "{modules={path}} has no modules of the kernel {version}",
        hint="specify a directory with modules.order, such as a build tree or the result of make modules_install",
        path=directory,
        version=version or "(unknown version)",
    )


def initrd(modules: Modules | None, kernel: str) -> bytes:
    """Return the initrd with the modules of a kernel. `kernel` is its version, or an empty string if that is unknown.

    Raises GuestError if a module cannot be read, or was built for another kernel.
    """
    file = io.BytesIO()
    archive = Initramfs(file)
    names = (*BOOT_MODULES, *EXTRA_MODULES, *USERLAND_MODULES)
    found = modules.load(names) if modules is not None else {}
    if modules is not None:
        _check_versions(found, kernel)
        directory = f"lib/modules/{modules.version}"
        for module in found.values():
            archive.add_file(f"{directory}/{module.name}.ko", module.content)
        archive.add_file(f"{directory}/modules.dep", modules_dep(found).encode())
        archive.add_file(f"{directory}/modules.alias", modules_alias(found).encode())
    archive.add_file("etc/modules", "".join(f"{name}\n" for name in BOOT_MODULES if name in found).encode())
    archive.close()
    return file.getvalue()


def _check_versions(found: Mapping[str, Module], kernel: str) -> None:
    """Raise GuestError for a module that this kernel refuses: the guest would wait for its devices without end."""
    other = next((each for each in found.values() if kernel and each.kernel not in ("", kernel)), None)
    if other is not None:
        raise GuestError.with_fields(
            "the module {name} was built for the kernel {other}, and the kernel is {kernel}",
            hint="build the modules again, or specify the directory of this kernel's modules with {modules=}",
            name=other.name,
            other=other.kernel,
            kernel=kernel,
        )


def check(linux: str, options: Mapping[str, str], modules: Modules | None, *, commands: bool, userland: str) -> None:
    """Raise StartError with the names of the options that the kernel lacks. `userland` is "", "ro" or "rw".

    Empty `options` mean that the kernel's configuration is unknown.
    """
    if not options:
        return
    loadable = {**(_FOR_COMMANDS if commands else {}), **(_FOR_USERLAND if userland else {})}
    loadable |= _FOR_OVERLAY if userland == "ro" else {}
    missing = [name for name in _NEEDED if options.get(name) != "y"]
    missing += [name for name in loadable if options.get(name) not in ("y", "m")]
    if missing:
        raise StartError(
            f"the kernel {linux} lacks {', '.join(missing)}", hint="set them in the kernel's configuration"
        )
    as_modules = {module for name, module in loadable.items() if options[name] == "m"}
    absent = modules.missing(sorted(as_modules)) if modules is not None else sorted(as_modules)
    if absent:
        raise GuestError.with_fields(
            "the kernel {linux} has {names} as modules, which were not found",
            hint="specify the directory of the kernel's modules with {modules=}",
            linux=linux,
            names=", ".join(name for name, module in loadable.items() if module in absent),
        )
