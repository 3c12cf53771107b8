# SPDX-License-Identifier: LGPL-2.1-or-later
"""Finds a QEMU binary, probes its features, and chooses the accelerator."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Mapping
from typing import Any

from ..cache import cache_directory
from ..errors import StartError, UsageError
from ..record import Record
from ..search_path import find_program

#: The oldest QEMU that is tested.
VERSION_MIN = (7, 2)

# The binaries for each architecture of the guest, and their packages.
_BINARIES = {
    "x86_64": ("qemu-system-x86_64", "/usr/libexec/qemu-kvm", "qemu-kvm"),
    "aarch64": ("qemu-system-aarch64",),
}
_PACKAGES = {
    "x86_64": "Debian: qemu-system-x86, Fedora: qemu-kvm",
    "aarch64": "Debian: qemu-system-arm, Fedora: qemu-system-aarch64",
}

#: The architecture of each machine type.
ARCHITECTURES = {"q35": "x86_64", "pc": "x86_64", "virt": "aarch64"}

_PROBE_TIMEOUT = 20.0
_NAME_ONE = "name a QEMU system emulator with {qemu=}"
_CACHE_FILE = "qemu-probes.json"


class QemuBinary(Record):
    """A QEMU binary, and the features that its command line depends on."""

    path: str
    version: tuple[int, int, int]
    #: The emulated architecture, in the kernel's spelling.
    architecture: str
    #: True if QEMU has `-object monitor-qmp`, which replaces the deprecated `-mon` (QEMU 11.1).
    has_monitor_object: bool
    #: True if NVMe namespaces can be hot-plugged (QEMU 11.1).
    has_namespaces: bool
    #: True if the binary was built with seccomp.
    has_sandbox: bool

    def to_state(self) -> dict[str, object]:
        """Return the fields as values for JSON, from which `from_state` restores the binary."""
        return {
            "path": self.path,
            "version": list(self.version),
            "architecture": self.architecture,
            "monitor_object": self.has_monitor_object,
            "namespaces": self.has_namespaces,
            "sandbox": self.has_sandbox,
        }

    @classmethod
    def from_state(cls, saved: Mapping[str, Any]) -> QemuBinary:
        """Restore a binary from the values of `to_state`. Raises KeyError, TypeError or ValueError for others."""
        major, minor, micro = map(int, saved["version"])
        features = (bool(saved[name]) for name in ("monitor_object", "namespaces", "sandbox"))
        return cls(str(saved["path"]), (major, minor, micro), str(saved["architecture"]), *features)


def find_qemu(explicit: str | None, machine_type: str = "q35") -> QemuBinary:
    """Find and probe a QEMU for a machine type. A probe takes 0.1 s, so its result is cached by the file's identity.

    Raises StartError if no QEMU is found, it does not run, or it is too old; UsageError if it emulates another
    architecture.
    """
    architecture = ARCHITECTURES[machine_type]
    path = _locate(explicit, architecture)
    try:
        found = os.stat(path)
    except OSError as error:
        raise StartError(f"cannot use QEMU {path}: {error.strerror}") from None
    identity = [found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size]
    binary = _cached(path, identity) or _probe(path, identity)
    if binary.version < VERSION_MIN:
        have, need = ".".join(map(str, binary.version)), ".".join(map(str, VERSION_MIN))
        raise StartError.with_fields(
            "{path} is QEMU {have}, which is too old",
            hint="install QEMU {need} or newer, or name one with {qemu=}",
            path=path,
            have=have,
            need=need,
        )
    if binary.architecture != architecture:
        raise UsageError.with_fields(
            "{path} emulates {found}, and {machine_type={type}} is {wanted}",
            hint="name a QEMU for {wanted} with {qemu=}, or another {machine_type=}",
            path=path,
            found=binary.architecture,
            type=machine_type,
            wanted=architecture,
        )
    return binary


def _locate(explicit: str | None, architecture: str) -> str:
    for candidate in (explicit,) if explicit else _BINARIES[architecture]:
        if path := find_program(candidate):
            return path
    if explicit:
        reason = "not executable" if os.path.exists(explicit) else "not found"
        raise StartError.with_fields("cannot use QEMU {path}: {reason}", hint=_NAME_ONE, path=explicit, reason=reason)
    raise StartError.with_fields(
        "no QEMU found: there is no {names}",
        hint="install it ({packages}), or name one with {qemu=}",
        names=" or ".join(_BINARIES[architecture]),
        packages=_PACKAGES[architecture],
    )


def _cached(path: str, identity: list[int]) -> QemuBinary | None:
    import json

    try:
        with open(_cache_file(), "rb") as file:
            entry = json.load(file)[path]
        if entry["identity"] != identity:
            return None
        return QemuBinary.from_state({**entry, "path": path})
    except (UsageError, OSError, ValueError, KeyError, TypeError):
        return None


def _cache_file() -> str:
    """Return the path of the cache. Raises UsageError for a user without a home directory."""
    return os.path.join(cache_directory(), _CACHE_FILE)


# The questions to a probed QEMU. Namespaces can be hot-plugged if their bus has a hot-plug handler.
# QEMU does not list options that it was built without.
_QUESTIONS: tuple[tuple[str, dict[str, str]], ...] = (
    ("qmp_capabilities", {}),
    ("query-version", {}),
    ("query-target", {}),
    ("query-qmp-schema", {}),
    ("query-command-line-options", {"option": "sandbox"}),
    ("qom-get", {"path": "/machine/peripheral/probe/probe", "property": "hotplug-handler"}),
    ("quit", {}),
)


def _probe(path: str, identity: list[int]) -> QemuBinary:
    """Run the binary to ask for its features, and cache the answers."""
    import json

    version = _parse_version(path, _run(path, "--version"))
    if version < VERSION_MIN:
        return QemuBinary(path, version, "", False, False, False)
    # The binary's name suggests a machine type; QEMU reports the architecture.
    machine = "virt" if "aarch64" in os.path.basename(path) else "q35"
    commands = "".join(json.dumps({"execute": name, "arguments": arguments}) for name, arguments in _QUESTIONS)
    options = ("-nodefaults", "-display", "none", "-S", "-qmp", "stdio", "-machine", machine)
    try:
        output = _run(path, *options, "-device", "nvme,id=probe,serial=probe", feed=commands)
    except StartError:
        # Some distributions build QEMU without the NVMe device.
        output = _run(path, *options, feed=commands)
    binary = _understand(path, version, output)
    _remember(binary, identity)
    return binary


def _understand(path: str, version: tuple[int, int, int], output: str) -> QemuBinary:
    """Make a QemuBinary of the answers to _QUESTIONS."""
    import json

    answers = [json.loads(line) for line in output.splitlines() if line.startswith(('{"return"', '{"error"'))]
    if len(answers) != len(_QUESTIONS):
        raise StartError(f"QEMU {path} gave {len(answers)} answers to {len(_QUESTIONS)} questions")
    _, _, target, schema, sandbox, handler, _ = (answer.get("return") for answer in answers)
    choices = [values for kind in schema if (values := kind.get("values"))]
    return QemuBinary(
        path,
        version,
        architecture=target["arch"],
        has_monitor_object=any("monitor-qmp" in values for values in choices),
        has_namespaces=bool(handler),
        has_sandbox=bool(sandbox),
    )


def _run(path: str, *arguments: str, feed: str = "") -> str:
    import subprocess

    from ..aio import programs

    # QEMU exits without writing the output that a full pipe does not take, so its output goes to a file in memory.
    output = os.memfd_create("vmspawn-probe")
    try:
        done = programs.run([path, *arguments], feed=feed.encode(), timeout=_PROBE_TIMEOUT, output=output)
        with open(output, "rb", closefd=False) as file:
            file.seek(0)
            answers = file.read()
    except OSError as error:
        raise StartError(f"cannot run QEMU {path}: {os.strerror(error.errno or errno.ENOEXEC)}") from None
    except subprocess.TimeoutExpired:
        raise StartError(f"QEMU {path} did not answer {arguments[0]} within {_PROBE_TIMEOUT:.0f} s") from None
    finally:
        os.close(output)
    if done.returncode != 0:
        words = done.stderr.decode(errors="replace").strip().splitlines() or [f"exit status {done.returncode}"]
        raise StartError(f"cannot run QEMU {path}: {words[-1]}")
    return answers.decode(errors="replace")


def _parse_version(path: str, text: str) -> tuple[int, int, int]:
    """Read the version in "QEMU emulator version 7.2.22 (Debian …)"."""
    words = text.split()
    if words[:3] != ["QEMU", "emulator", "version"] or len(words) < 4:
        raise StartError.with_fields("{path} is not QEMU", hint=_NAME_ONE, path=path)
    numbers = [int(part) if part.isdigit() else 0 for part in words[3].split(".")]
    major, minor, micro = (*numbers, 0, 0, 0)[:3]
    return major, minor, micro


def _remember(binary: QemuBinary, identity: list[int]) -> None:
    """Add a probe to the cache. A cache that cannot be written is ignored: the next start probes again."""
    import json

    try:
        path = _cache_file()
        try:
            with open(path, "rb") as file:
                entries = json.load(file)
        except (OSError, ValueError):
            entries = {}
        entries[binary.path] = {"identity": identity, **binary.to_state()}
        os.makedirs(os.path.dirname(path), exist_ok=True)
        fresh = f"{path}.{os.getpid()}"
        with open(fresh, "w") as file:
            json.dump(entries, file)
        os.replace(fresh, path)
    except (UsageError, OSError, TypeError):
        pass


def choose_accelerator(kvm: str, architecture: str) -> tuple[str, str]:
    """Choose the accelerator; returns its name, and the reason if it is TCG although `kvm` is auto.

    /dev/kvm may open on hosts whose processor has no virtualization, where guests hang; so the processor is checked as
    well. Raises UsageError if `kvm` is yes and KVM cannot be used.
    """
    if kvm == "no":
        return "tcg", ""
    reason = _why_no_kvm(architecture)
    if not reason:
        return "kvm", ""
    if kvm == "yes":
        raise UsageError.with_fields(
            "{kvm=yes}, but {reason}", hint="use {kvm=auto} or {kvm=no} for emulation", reason=reason
        )
    return "tcg", reason


def _why_no_kvm(architecture: str) -> str:
    host = os.uname().machine
    if host != architecture:
        return f"this host is {host} and the guest {architecture}"
    try:
        os.close(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return why_not_opened(error)
    if host == "x86_64" and not {"vmx", "svm"} & _cpu_flags():
        return "the processor shows neither vmx nor svm"
    return ""


def why_not_opened(error: OSError) -> str:
    """Explain why /dev/kvm cannot be opened, and how to get the permission if that is missing."""
    way_out = "; add yourself to the group kvm" if error.errno == errno.EACCES else ""
    return f"/dev/kvm cannot be opened: {error.strerror}{way_out}"


def _cpu_flags() -> set[str]:
    """Return the flags of the first processor."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        return set(next((line for line in file if line.startswith("flags")), "").split())
    return set()
