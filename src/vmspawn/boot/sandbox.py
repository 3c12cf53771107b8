# SPDX-License-Identifier: LGPL-2.1-or-later
"""What QEMU forbids itself, so that a guest that breaks out of its machine is still in a cage.

These are the filters of QEMU's `-sandbox` (docs/system/security.rst; qemu-options.hx): system calls of old interfaces,
those that raise privileges, start programs, or change the scheduling of processes, end QEMU. It starts no program in
any case: what a machine needs beside it is started by us.
"""

from __future__ import annotations

from itertools import pairwise

from .config import MachineConfig
from .qemu import QemuBinary

_STRICT = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"

# The drivers of 3D libraries pin their threads to processors.
_WITH_WINDOW = "on,obsolete=deny,elevateprivileges=deny,spawn=deny"


def sandbox(binary: QemuBinary, config: MachineConfig) -> list[str]:
    """QEMU's options for it; none where it was built without, or the user brings his own."""
    if not binary.sandbox or "-sandbox" in config.qemu_arguments:
        return []
    return ["-sandbox", _WITH_WINDOW if config.console == "gui" else _STRICT]


def may_start_programs(pid: int) -> bool:
    """Whether a running QEMU's sandbox lets it start programs; read from its command line, whoever wrote that."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            words = file.read().split(b"\0")
    except OSError:
        return True
    return not any(b"spawn=deny" in value.split(b",") for word, value in pairwise(words) if word == b"-sandbox")
