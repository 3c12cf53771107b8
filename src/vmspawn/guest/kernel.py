# SPDX-License-Identifier: LGPL-2.1-or-later
"""Where the kernel of the built-in guest comes from: this host runs one, or its distribution has one."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from vmspawn.errors import GuestError
from vmspawn.guest.modules import Modules
from vmspawn.guest.packages import Fetcher, available

# Without these a disk on some bus is not seen, or the power button is not heard.
_NEEDED = ("virtio_pci", "virtio_blk", "nvme", "virtio_scsi", "sd_mod", "sr_mod", "isofs", "evdev")
NEEDED_MODULES = {"x86_64": (*_NEEDED, "button"), "aarch64": (*_NEEDED, "gpio_keys")}

#: The packages that stand for the newest kernel, of Debian and of Ubuntu. Debian's kernel for arm64 clouds lacks
#: gpio_keys, and with it the power button of a machine that has a device tree.
METAPACKAGES = {
    "x86_64": ("linux-image-cloud-amd64", "linux-image-virtual"),
    "aarch64": ("linux-image-arm64", "linux-image-virtual"),
}


class Kernel:
    """A kernel image and its modules."""

    def __init__(self, image: Path, modules: Modules) -> None:
        self.image = image
        self.modules = modules


def find_kernel(architecture: str, fetcher: Fetcher, progress: Callable[[str], None]) -> Kernel:
    """The host's kernel if it will do, else the distribution's."""
    reason = f"this host does not run a kernel for {architecture}"
    if os.uname().machine == architecture:
        try:
            return host_kernel(architecture)
        except GuestError as error:
            reason = str(error)
    if not available():
        raise GuestError(
            f"the built-in guest has no kernel: {reason}, and there is no apt-get to fetch one with",
            hint="Boot a kernel of your own with --linux= and --initrd=, or an image with --image=.",
        )
    return _kernel_in(fetcher.fetch_kernel(METAPACKAGES[architecture]), architecture)


def host_kernel(architecture: str, root: Path = Path("/"), release: str = "") -> Kernel:
    """The kernel that runs here, from where distributions install it; GuestError says why it will not do."""
    release = release or os.uname().release
    images = [root / f"boot/vmlinuz-{release}", root / f"lib/modules/{release}/vmlinuz"]
    image = next((image for image in images if os.access(image, os.R_OK)), None)
    if image is None:
        state = "cannot be read" if images[0].exists() else "does not exist"
        raise GuestError(f"{images[0]} {state}")
    return _checked(Kernel(image, Modules(root / "lib/modules" / release)), architecture)


def _kernel_in(tree: Path, architecture: str) -> Kernel:
    """The kernel in a tree of unpacked packages."""
    image = next(tree.glob("boot/vmlinuz-*"), None)
    modules = next((found for base in ("lib", "usr/lib") for found in tree.glob(f"{base}/modules/*")), None)
    if image is None or modules is None:
        raise GuestError("the distribution's package of a kernel has no /boot/vmlinuz or no modules")
    return _checked(Kernel(image, Modules(modules)), architecture)


def _checked(kernel: Kernel, architecture: str) -> Kernel:
    missing = kernel.modules.missing(NEEDED_MODULES[architecture])
    if missing:
        raise GuestError(f"the kernel {kernel.modules.version} lacks {', '.join(missing)}")
    return kernel
