# SPDX-License-Identifier: LGPL-2.1-or-later
"""Provides UEFI firmware for tests: the distribution's package, unpacked into the cache without installing it."""

import fcntl
import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest

from vmspawn.cache import cache_directory
from vmspawn.errors import GuestError
from vmspawn.guest.packages import Fetcher

PACKAGE = "ovmf"

_DESCRIPTORS = "/usr/share/qemu/firmware"


def cache() -> Path:
    """Return the cache directory for files that take long to make."""
    folder = Path(cache_directory()) / "test"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def tree() -> Path:
    """Return the unpacked package, or the system's root if it is installed. Skips the test if neither works."""
    if Path(_DESCRIPTORS, "60-edk2-x86_64.json").exists():
        return Path("/")
    final = cache() / PACKAGE
    with (cache() / f"{PACKAGE}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not final.exists():
            with tempfile.TemporaryDirectory(dir=cache()) as scratch:
                try:
                    fetched = Fetcher("x86_64", Path(scratch), lambda _: None).fetch(PACKAGE)
                except GuestError as error:
                    pytest.skip(f"no UEFI firmware for tests: {error}")
                shutil.move(fetched, final)
    return final


def install(config_home: Path) -> Path:
    """Write descriptors of the firmware to a user's configuration directory. Returns their directory."""
    source = tree()
    target = config_home / "qemu" / "firmware"
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted((source / _DESCRIPTORS.lstrip("/")).glob("*.json")):
        descriptor = json.loads(path.read_text())
        for blob in descriptor["mapping"].values():
            if isinstance(blob, dict):
                blob["filename"] = str(source / blob["filename"].lstrip("/"))
        (target / path.name).write_text(json.dumps(descriptor))
    return target


def environment(config_home: Path) -> dict[str, str]:
    """Return the environment of a user with that configuration directory."""
    return {**os.environ, "XDG_CONFIG_HOME": str(config_home)}
