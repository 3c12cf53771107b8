# SPDX-License-Identifier: LGPL-2.1-or-later
"""Makes the initrd for a built-in guest that runs on the user's kernel, or in a directory of the host.

The start of any other machine does not load this module.
"""

from __future__ import annotations

from ..errors import StartError
from ..guest import own_kernel
from ..images import kernel_config, kernel_image
from .config import MachineConfig


def initrd(config: MachineConfig, guests_initrd: str) -> bytes:
    """Return the built-in guest's initrd from its file, followed by an initrd with the modules of the user's kernel.

    Raises StartError if the kernel's configuration shows that it cannot run the guest, or GuestError.
    """
    try:
        with open(guests_initrd, "rb") as file:
            base = file.read()
        if config.linux is None:
            return base
        version = kernel_image.version_of(config.linux)
        modules = own_kernel.find_modules(config.modules, version)
        options = kernel_config.read(config.linux, config.modules)
    except OSError as error:
        raise StartError(f"cannot read {error.filename}: {error.strerror}") from None
    userland = "" if not config.is_userland else "rw" if config.directory_rw else "ro"
    own_kernel.check(config.linux, options, modules, commands=config.agent, userland=userland)
    return base + bytes(-len(base) % kernel_image.INITRD_ALIGNMENT) + own_kernel.initrd(modules, version)
