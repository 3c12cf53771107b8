# SPDX-License-Identifier: LGPL-2.1-or-later
"""Finds a kernel for the built-in guest: the distribution's kernel for virtual machines, or else the host's kernel.

The distribution's kernel comes first, because it is the same on every host, and Debian's cloud kernel boots in less
than half the time of its kernel for real hardware.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from ..errors import GuestError
from .modules import Modules
from .packages import Fetcher, available

# Modules that the disks on all buses and the power button need.
_NEEDED = ("virtio_pci", "virtio_blk", "nvme", "virtio_scsi", "sd_mod", "sr_mod", "isofs", "evdev")
NEEDED_MODULES = {"x86_64": (*_NEEDED, "button"), "aarch64": (*_NEEDED, "gpio_keys")}

# Directories of modules below a root. The second may be a link to the first.
_MODULES = ("usr/lib/modules", "lib/modules")

#: Debian's and Ubuntu's packages that depend on the newest kernel. Debian's cloud kernel for arm64 is not among them:
#: it lacks gpio_keys, which the power button of a machine with a device tree needs.
METAPACKAGES = {
    "x86_64": ("linux-image-cloud-amd64", "linux-image-virtual"),
    "aarch64": ("linux-image-arm64", "linux-image-virtual"),
}


class Kernel:
    """A kernel image and its modules."""

    def __init__(self, image: Path, modules: Modules) -> None:
        self.image = image
        self.modules = modules


def find_kernel(architecture: str, fetcher: Fetcher, on_progress: Callable[[str], None]) -> Kernel:
    """Return the distribution's kernel if it can be fetched, else the host's kernel. Raises GuestError."""
    errors: list[GuestError] = []
    for source in (_distribution_kernel, _running_kernel):
        try:
            return source(architecture, fetcher, on_progress)
        except GuestError as error:
            errors.append(error)
    raise GuestError.with_fields(
        "the built-in guest has no kernel: {reasons}",
        hint=(errors[0].hint and "{first}")
        or "boot another kernel with {linux=} and {initrd=}, or an image with {image=}",
        reasons="; ".join(map(str, errors)),
        first=errors[0],
    )


def _distribution_kernel(architecture: str, fetcher: Fetcher, on_progress: Callable[[str], None]) -> Kernel:
    if not available():
        raise GuestError("apt-get is not installed, so no kernel can be downloaded")
    tree = fetcher.fetch_kernel(METAPACKAGES[architecture])
    release = next((path.name for base in _MODULES for path in tree.glob(f"{base}/*")), "none")
    return kernel_at(tree, release, architecture)


def _running_kernel(architecture: str, fetcher: Fetcher, on_progress: Callable[[str], None]) -> Kernel:
    if os.uname().machine != architecture:
        raise GuestError(f"this host's kernel is not for {architecture}")
    kernel = kernel_at(Path("/"), os.uname().release, architecture)
    on_progress(f"Using this host's kernel, {kernel.modules.version}")
    return kernel


def kernel_at(root: Path, release: str, architecture: str) -> Kernel:
    """Return the kernel of a release that is installed below `root`. Raises GuestError if it cannot be used."""
    directories = [root / base / release for base in _MODULES]
    images = [root / f"boot/vmlinuz-{release}", *(directory / "vmlinuz" for directory in directories)]
    image = next((image for image in images if os.access(image, os.R_OK)), None)
    directory = next((directory for directory in directories if directory.is_dir()), None)
    if image is None:
        raise GuestError(f"{images[0]} {'cannot be read' if images[0].exists() else 'does not exist'}")
    if directory is None:
        raise GuestError(f"{directories[0]} does not exist")
    modules = Modules(directory)
    if missing := modules.missing(NEEDED_MODULES[architecture]):
        raise GuestError(f"the kernel {release} lacks {', '.join(missing)}")
    return Kernel(image, modules)
