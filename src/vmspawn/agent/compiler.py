# SPDX-License-Identifier: LGPL-2.1-or-later
"""Compiles the agent: a static program without a C library, for x86-64 and aarch64."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from ..errors import StartError
from ..search_path import find_program

_FOLDER = Path(__file__).parent

#: The number that ELF has for each architecture (e_machine).
MACHINES = {"x86_64": 62, "aarch64": 183}

#: The maximum size. A larger agent does not fit in the firmware's tables beside other credentials (install.py).
SIZE_MAX = 32 * 1024

_FLAGS = (
    *("-std=gnu11", "-Os", "-Wall", "-Wextra", "-s"),
    *("-static", "-nostdlib", "-ffreestanding", "-fno-pic", "-no-pie"),
    # The kernel's structures are read from buffers of bytes
    "-fno-strict-aliasing",
    # memcpy must not be compiled to a call of memcpy
    "-fno-builtin",
    "-fno-tree-loop-distribute-patterns",
    # Features that need a C library, or only add size
    *("-fno-stack-protector", "-fno-asynchronous-unwind-tables", "-fno-unwind-tables"),
    *("-Wl,--build-id=none", "-Wl,-z,noseparate-code", "-Wl,-z,noexecstack", "-Wl,--gc-sections"),
)

# zig compiles its own libraries in its first run.
_TIMEOUT = 180


def compile_agent(architecture: str, target: str) -> None:
    """Compile the agent for an architecture to a path, whose directory is created. Raises StartError."""
    if architecture not in MACHINES:
        raise StartError(
            f"there is no agent for {architecture}", hint=f"there is one for {' and '.join(sorted(MACHINES))}"
        )
    path = Path(target)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _compile(architecture, path)
    except OSError as error:
        raise StartError(
            f"cannot compile the agent in {path.parent}: {error.strerror}",
            hint="set VMSPAWN_CACHE_DIR to another directory",
        ) from error


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
        hint=f"install gcc{'' if is_native(architecture) else f'-{architecture}-linux-gnu'.replace('_', '-')}"
        " and the kernel's headers (linux-libc-dev), or set CC to a compiler",
    )


def is_native(architecture: str) -> bool:
    """Return whether the architecture is that of this host."""
    return os.uname().machine == architecture


def compilers(architecture: str) -> Iterator[tuple[str, ...]]:
    """Yield the commands that may compile for the architecture."""
    if chosen := os.environ.get("CC"):
        yield tuple(shlex.split(chosen))
    names = ("cc", "gcc", "clang") if is_native(architecture) else (f"{architecture}-linux-gnu-gcc",)
    yield from ((name,) for name in names if find_program(name))
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
        return f"did not finish within {_TIMEOUT} s"
    except OSError as error:
        return error.strerror or str(error)
    if done.returncode == 0:
        return ""
    lines = done.stderr.splitlines()
    return next((line for line in lines if "error" in line), f"exit status {done.returncode}")


def unfit(path: Path, architecture: str) -> str:
    """Return why a program cannot be the agent for the architecture, or an empty string."""
    content = path.read_bytes()
    if content[:6] != b"\x7fELF\x02\x01" or int.from_bytes(content[18:20], "little") != MACHINES[architecture]:
        return f"its output is not a program for {architecture}"
    if len(content) > SIZE_MAX:
        return f"its output has {len(content)} bytes, more than {SIZE_MAX}"
    return ""
