# SPDX-License-Identifier: LGPL-2.1-or-later
"""The QEMU binary: which one, what it can do, and which accelerator the host lets it use."""

from __future__ import annotations

import errno
import os
from typing import NamedTuple

from ..errors import StartError, UsageError

#: The oldest QEMU that is tested.
VERSION_MIN = (7, 2)

_BINARIES = ("qemu-system-x86_64", "/usr/libexec/qemu-kvm", "qemu-kvm")

_PROBE_TIMEOUT = 20.0
_CACHE_FILE = "qemu-probes.json"


class QemuBinary(NamedTuple):
    """A QEMU and what we need to know of it before it runs."""

    path: str
    version: tuple[int, int, int]
    #: QEMU 11.1 brought `-object monitor-qmp` and deprecated `-mon`.
    monitor_object: bool


def find_qemu(explicit: str | None) -> QemuBinary:
    """Find and probe QEMU. Probes are cached by the file's identity, for running QEMU twice costs 60 ms.

    Raises StartError if there is none, it does not run, or it is too old.
    """
    path = _locate(explicit)
    try:
        found = os.stat(path)
    except OSError as error:
        raise StartError(f"cannot use QEMU {path}: {error.strerror}") from None
    identity = [found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size]
    binary = _cached(path, identity) or _probe(path, identity)
    if binary.version < VERSION_MIN:
        have, need = ".".join(map(str, binary.version)), ".".join(map(str, VERSION_MIN))
        raise StartError(
            f"{path} is QEMU {have}, which is too old", hint=f"install QEMU {need} or newer, or name one by --qemu="
        )
    return binary


def _locate(explicit: str | None) -> str:
    for candidate in (explicit,) if explicit else _BINARIES:
        if path := _which(candidate):
            return path
    if explicit:
        reason = "not executable" if os.path.exists(explicit) else "not found"
        raise StartError(f"cannot use QEMU {explicit}: {reason}", hint="name a QEMU system emulator by --qemu=")
    raise StartError(
        f"no QEMU found: neither of {', '.join(_BINARIES)}",
        hint="install it (Debian: qemu-system-x86, Fedora: qemu-kvm), or name one by --qemu=",
    )


def _which(name: str) -> str | None:
    """Like shutil.which, which would import more than all of this."""
    folders = [""] if os.sep in name else os.environ.get("PATH", os.defpath).split(os.pathsep)
    for folder in folders:
        path = os.path.join(folder, name)
        if os.path.isfile(path) and os.access(path, os.X_OK):
            return os.path.abspath(path)
    return None


def cache_directory() -> str:
    """Where what can be made again is kept."""
    if explicit := os.environ.get("VMSPAWN_CACHE_DIR"):
        return explicit
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(base, "vmspawn")


def _cached(path: str, identity: list[int]) -> QemuBinary | None:
    import json

    try:
        with open(os.path.join(cache_directory(), _CACHE_FILE), "rb") as file:
            entry = json.load(file)[path]
        if entry["identity"] != identity:
            return None
        major, minor, micro = entry["version"]
        return QemuBinary(path, (major, minor, micro), bool(entry["monitor_object"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _probe(path: str, identity: list[int]) -> QemuBinary:
    """Ask the binary, and remember its answers."""
    version_text = _run(path, "--version")
    version = _parse_version(path, version_text)
    monitor_object = "monitor-qmp" in _run(path, "-object", "help").split() if version >= VERSION_MIN else False
    binary = QemuBinary(path, version, monitor_object)
    _remember(binary, identity)
    return binary


def _run(path: str, *arguments: str) -> str:
    import subprocess

    try:
        done = subprocess.run(
            [path, *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_PROBE_TIMEOUT,
            check=False,
        )
    except OSError as error:
        raise StartError(f"cannot run QEMU {path}: {os.strerror(error.errno or errno.ENOEXEC)}") from None
    except subprocess.TimeoutExpired:
        raise StartError(f"QEMU {path} did not answer {arguments[0]} within {_PROBE_TIMEOUT:.0f} s") from None
    if done.returncode != 0:
        words = done.stderr.decode(errors="replace").strip().splitlines() or [f"exit status {done.returncode}"]
        raise StartError(f"cannot run QEMU {path}: {words[-1]}")
    return done.stdout.decode(errors="replace")


def _parse_version(path: str, text: str) -> tuple[int, int, int]:
    """The version from "QEMU emulator version 7.2.22 (Debian …)"."""
    words = text.split()
    if words[:3] != ["QEMU", "emulator", "version"] or len(words) < 4:
        raise StartError(f"{path} is not QEMU", hint="name a QEMU system emulator by --qemu=")
    numbers = [int(part) if part.isdigit() else 0 for part in words[3].split(".")]
    major, minor, micro = (*numbers, 0, 0, 0)[:3]
    return major, minor, micro


def _remember(binary: QemuBinary, identity: list[int]) -> None:
    """Add to the cache. That it cannot be written costs time at the next start and is no error."""
    import json

    path = os.path.join(cache_directory(), _CACHE_FILE)
    try:
        try:
            with open(path, "rb") as file:
                entries = json.load(file)
        except (OSError, ValueError):
            entries = {}
        entries[binary.path] = {
            "identity": identity,
            "version": binary.version,
            "monitor_object": binary.monitor_object,
        }
        os.makedirs(os.path.dirname(path), exist_ok=True)
        fresh = f"{path}.{os.getpid()}"
        with open(fresh, "w") as file:
            json.dump(entries, file)
        os.replace(fresh, path)
    except (OSError, TypeError):
        pass


def choose_accelerator(kvm: str) -> tuple[str, str]:
    """The accelerator for `--kvm=auto|yes|no`, and why it is TCG where the user might have expected KVM.

    An open /dev/kvm is not enough: there are hosts where it opens without the processor's help, and guests hang. Raises
    UsageError if KVM was a firm wish and cannot be.
    """
    if kvm == "no":
        return "tcg", ""
    reason = _why_no_kvm()
    if not reason:
        return "kvm", ""
    if kvm == "yes":
        raise UsageError(f"--kvm=yes, but {reason}", hint="use --kvm=auto or --kvm=no for emulation")
    return "tcg", reason


def _why_no_kvm() -> str:
    try:
        os.close(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return f"/dev/kvm cannot be opened: {error.strerror}"
    if os.uname().machine == "x86_64" and not {"vmx", "svm"} & _cpu_flags():
        return "the processor shows neither vmx nor svm"
    return ""


def _cpu_flags() -> set[str]:
    """The flags of the first processor; the file has an entry for each and can be long."""
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("flags"):
                    return set(line.split())
    except OSError:
        pass
    return set()
