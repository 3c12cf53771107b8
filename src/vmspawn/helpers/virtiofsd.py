# SPDX-License-Identifier: LGPL-2.1-or-later
"""Finds virtiofsd, which serves a directory of the host to a guest, and builds its command line.

There are two programs of that name: the current one in Rust, and the one in C that QEMU included up to 7.2. Their
options differ; --version distinguishes them.
"""

from __future__ import annotations

import os
from typing import NamedTuple

from ..errors import StartError
from ..search_path import find_program
from ..text import utf8

#: Paths outside PATH where distributions install it, and the directories of the JSON files that describe it for QEMU.
#: A path in one of these files has precedence.
_PLACES = ("/usr/libexec/virtiofsd", "/usr/lib/virtiofsd", "/usr/lib/qemu/virtiofsd", "/usr/local/libexec/virtiofsd")
_DESCRIPTORS = ("/etc/qemu/vhost-user", "/usr/share/qemu/vhost-user")

_PROBE_TIMEOUT = 10.0

_HINT = "install it (Debian and Fedora: virtiofsd; Debian 12: it comes with qemu-system-common)"


class Virtiofsd(NamedTuple):
    """An installed virtiofsd. `is_rust` is true for the program in Rust."""

    path: str
    is_rust: bool
    can_refuse_writes: bool

    def command(self, directory: str, listener: int, *, read_only: bool) -> list[str]:
        """Return the command that serves a directory on the listening socket `listener`.

        Mount points below the root of the share are not announced, because QEMU does not support that. Raises
        StartError for a name that the program does not accept.
        """
        if not self.is_rust:
            # A comma would end the value; two commas stand for one.
            source = directory.replace(",", ",,")
            # The default sandbox uses pivot_root(2), which fails if the directory is the root already.
            sandbox = ",sandbox=chroot" if os.path.realpath(directory) == "/" else ""
            return [self.path, "-f", f"--fd={listener}", "-o", f"source={source},xattr{sandbox}"]
        if utf8(directory) != directory:
            raise StartError(
                f"cannot share {directory}: {self.path} supports UTF-8 names only", hint="rename the directory"
            )
        options = ["--xattr", "--no-announce-submounts"]
        if read_only and self.can_refuse_writes:
            options.append("--readonly")
        return [self.path, f"--fd={listener}", f"--shared-dir={directory}", *options]


def find() -> Virtiofsd:
    """Find virtiofsd and its features. Raises StartError if it is not installed, or does not run."""
    path = next((each for each in (*_described(), *_PLACES) if os.access(each, os.X_OK)), None)
    path = path or find_program("virtiofsd")
    if path is None:
        raise StartError("cannot share a directory: virtiofsd is not installed", hint=_HINT)
    rust = "virtiofsd version" not in _ask(path, "--version")
    return Virtiofsd(path, rust, rust and "--readonly" in _ask(path, "--help"))


def _described() -> list[str]:
    """Return the programs in QEMU's descriptors of vhost-user back ends (QEMU's docs/interop/vhost-user.json)."""
    import json

    found = []
    for directory in _DESCRIPTORS:
        try:
            names = sorted(os.listdir(directory))
        except OSError:
            continue
        for name in names:
            try:
                with open(os.path.join(directory, name), "rb") as file:
                    descriptor = json.load(file)
                if descriptor["type"] == "fs":
                    found.append(str(descriptor["binary"]))
            except (OSError, ValueError, KeyError, TypeError):
                continue
    return found


def _ask(path: str, option: str) -> str:
    import subprocess

    from ..aio import programs

    try:
        done = programs.run([path, option], timeout=_PROBE_TIMEOUT)
    except subprocess.TimeoutExpired:
        raise StartError(f"{path} did not answer {option} within {_PROBE_TIMEOUT:g} s") from None
    except OSError as error:
        raise StartError(f"cannot run {path}: {error.strerror}", hint=_HINT) from None
    return (done.stdout + done.stderr).decode(errors="replace")
