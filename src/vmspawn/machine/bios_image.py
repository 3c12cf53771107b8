# SPDX-License-Identifier: LGPL-2.1-or-later
"""Explains why BIOS does not boot an image."""

from __future__ import annotations

import os

from ..images import partitions, qcow2


def why_not_bootable(path: str, image_format: str) -> str:
    """Return the reason why BIOS cannot boot an image, or an empty string if none is known."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return ""
    try:
        if image_format == "qcow2":
            problem = partitions.bios_problem(qcow2.Reader(fd, path).read)
        elif image_format == "raw":
            problem = partitions.bios_problem(lambda offset, length: os.pread(fd, length, offset))
        else:
            problem = ""
    except (OSError, ValueError):
        return ""
    finally:
        os.close(fd)
    return f"the machine boots by BIOS, and {path} {problem}" if problem else ""
