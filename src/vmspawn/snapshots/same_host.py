# SPDX-License-Identifier: LGPL-2.1-or-later
"""Compares the host's processor and a machine's firmware with those that a snapshot was made with.

This module is on the start path and imports next to nothing.
"""

from __future__ import annotations

from ..errors import StartError
from .manifest import Manifest

#: The fields of /proc/cpuinfo that describe a processor to a guest, on x86 and on ARM.
_FIELDS = (
    *("vendor_id", "cpu family", "model", "model name", "stepping", "flags"),
    *("CPU implementer", "CPU architecture", "CPU variant", "CPU part", "CPU revision", "Features"),
)

#: Advice for a snapshot that was saved with another QEMU, firmware or processor.
HINT = "its copies may fail on this host; the option force-version starts one nevertheless"


def processor(accelerator: str) -> str:
    """Return the fields of the host's first processor, or an empty string for an emulated guest."""
    if accelerator != "kvm":
        return ""
    with open("/proc/cpuinfo") as file:
        lines = file.read().partition("\n\n")[0].splitlines()
    return "\n".join(line for line in lines if line.partition("\t")[0].partition(":")[0].strip() in _FIELDS)


def check(manifest: Manifest) -> None:
    """Raise StartError if the saved state needs another processor or firmware than this host has."""
    if manifest.state is None:
        return
    if manifest.processor and manifest.processor != processor(manifest.accelerator):
        raise StartError(f"snapshot {manifest.full_name} was saved on another processor", hint=HINT)
    if manifest.firmware is not None and manifest.firmware.sha256 != hash_of(manifest.firmware.path):
        raise StartError(
            f"snapshot {manifest.full_name} was saved with another firmware than the present {manifest.firmware.path}",
            hint=HINT,
        )


def hash_of(path: str) -> str:
    """Return the SHA-256 of a file in hexadecimal. Raises StartError."""
    # Machines without UEFI do not load this large module.
    import hashlib

    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise StartError(f"cannot read the firmware {path}: {error.strerror}") from None
