# SPDX-License-Identifier: LGPL-2.1-or-later
"""Confines QEMU with its seccomp filters, so that a guest that takes over QEMU can do little.

The filters are those of QEMU's `-sandbox` (docs/system/security.rst; qemu-options.hx). The kernel kills QEMU if it
makes an obsolete system call, raises its privileges or starts a program. System calls that change the scheduling of
processes fail with EPERM. QEMU never has to start a program, because vmspawn starts the helper processes.
"""

from __future__ import annotations

from itertools import pairwise

from .config import MachineConfig
from .qemu import QemuBinary

_STRICT = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"

# The drivers of 3D libraries pin their threads to processors.
_WITH_WINDOW = "on,obsolete=deny,elevateprivileges=deny,spawn=deny"


def sandbox(binary: QemuBinary, config: MachineConfig) -> list[str]:
    """Return QEMU's options for the sandbox; an empty list if QEMU was built without it, or the user specifies one."""
    if not binary.has_sandbox or "-sandbox" in config.qemu_arguments:
        return []
    return ["-sandbox", _WITH_WINDOW if config.console == "gui" else _STRICT]


def may_start_programs(pid: int) -> bool:
    """Return whether a running QEMU's sandbox allows it to start programs, according to its command line."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            words = file.read().split(b"\0")
    except OSError:
        return True
    return not any(b"spawn=deny" in value.split(b",") for word, value in pairwise(words) if word == b"-sandbox")
