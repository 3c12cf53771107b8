# SPDX-License-Identifier: LGPL-2.1-or-later
"""Compile the agent: a static program without a C library, for x86-64 and aarch64.

A wheel brings it compiled. From a source tree it is compiled when it is first needed, and kept in the cache.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from ..cache import cache_directory
from ..errors import StartError, UsageError

_FOLDER = Path(__file__).parent
SOURCES = ("agent.c", "kernel.h")

#: The number that ELF has for each architecture (e_machine).
MACHINES = {"x86_64": 62, "aarch64": 183}

#: Larger ones do not fit in the firmware's tables beside other credentials (install.py).
SIZE_MAX = 32 * 1024

_FLAGS = (
    *("-std=gnu11", "-Os", "-Wall", "-Wextra", "-s"),
    *("-static", "-nostdlib", "-ffreestanding", "-fno-pic", "-no-pie"),
    # The kernel's structures are read from buffers of bytes
    "-fno-strict-aliasing",
    # memcpy must not be compiled to a call of memcpy
    "-fno-builtin",
    "-fno-tree-loop-distribute-patterns",
    # What a C library would be needed for, or what only adds size
    *("-fno-stack-protector", "-fno-asynchronous-unwind-tables", "-fno-unwind-tables"),
    *("-Wl,--build-id=none", "-Wl,-z,noseparate-code", "-Wl,-z,noexecstack", "-Wl,--gc-sections"),
)

# zig compiles parts of its own at its first run.
_TIMEOUT = 180


def build(architecture: str, folder: Path | None = None) -> Path:
    """Return the path of the agent for an architecture. Compile it unless this version is in the folder.

    The folder is the user's cache by default. Raises StartError.
    """
    if architecture not in MACHINES:
        raise StartError(
            f"there is no agent for {architecture}", hint=f"There is one for {' and '.join(sorted(MACHINES))}."
        )
    packaged = _FOLDER / f"agent-{architecture}"
    if folder is None and packaged.exists():
        return packaged
    folder = folder or _default_folder()
    path = folder / f"agent-{architecture}-{fingerprint()}"
    if not path.exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _compile(architecture, path)
        except OSError as error:
            raise StartError(
                f"cannot compile the agent in {folder}: {error.strerror}",
                hint="VMSPAWN_CACHE_DIR= names another directory for it.",
            ) from error
    return path


def _default_folder() -> Path:
    """Return the folder in the user's cache that keeps compiled agents. Raises StartError."""
    try:
        return Path(cache_directory(), "agent")
    except UsageError as error:
        raise StartError(f"cannot compile the agent: {error}", hint=error.hint) from None


def fingerprint() -> str:
    """A short name for the sources and how they are compiled."""
    digest = hashlib.sha256(" ".join(_FLAGS).encode())
    for name in SOURCES:
        digest.update((_FOLDER / name).read_bytes())
    return digest.hexdigest()[:16]


def _compile(architecture: str, path: Path) -> None:
    """Try the compilers, one after the other. The file appears in one step."""
    reasons: list[str] = []
    with tempfile.TemporaryDirectory(prefix=".new-", dir=path.parent) as scratch:
        output = Path(scratch, "agent")
        for compiler in compilers(architecture):
            reason = _run(compiler, output) or unfit(output, architecture)
            if not reason:
                output.chmod(0o755)
                output.rename(path)
                return
            reasons.append(f"{shlex.join(compiler)}: {reason}")
    raise StartError(
        f"cannot compile the agent for {architecture}: {'; '.join(reasons) or 'there is no C compiler'}",
        hint=f"Install gcc{'' if is_native(architecture) else f'-{architecture}-linux-gnu'.replace('_', '-')}"
        " and the kernel's headers (linux-libc-dev), or name a compiler with CC=.",
    )


def is_native(architecture: str) -> bool:
    """Whether this host has the architecture."""
    return os.uname().machine == architecture


def compilers(architecture: str) -> Iterator[tuple[str, ...]]:
    """The commands that may compile for the architecture."""
    if chosen := os.environ.get("CC"):
        yield tuple(shlex.split(chosen))
    names = ("cc", "gcc", "clang") if is_native(architecture) else (f"{architecture}-linux-gnu-gcc",)
    yield from ((name,) for name in names if shutil.which(name))
    if find_spec("ziglang"):
        yield (sys.executable, "-m", "ziglang", "cc", "-target", f"{architecture}-linux-musl")


def _run(compiler: tuple[str, ...], output: Path) -> str:
    """Run a compiler; return why it failed, or an empty string."""
    command = [*compiler, *_FLAGS, "-o", str(output), str(_FOLDER / "agent.c")]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=_TIMEOUT
        )
    except subprocess.TimeoutExpired:
        return f"not done after {_TIMEOUT} s"
    except OSError as error:
        return error.strerror or str(error)
    if done.returncode == 0:
        return ""
    lines = done.stderr.splitlines()
    return next((line for line in lines if "error" in line), f"exit status {done.returncode}")


def unfit(path: Path, architecture: str) -> str:
    """Why a program is not an agent for the architecture, or an empty string."""
    content = path.read_bytes()
    if content[:6] != b"\x7fELF\x02\x01" or int.from_bytes(content[18:20], "little") != MACHINES[architecture]:
        return f"it made no program for {architecture}"
    if len(content) > SIZE_MAX:
        return f"it made a program of {len(content)} bytes, more than {SIZE_MAX}"
    return ""
