# SPDX-License-Identifier: LGPL-2.1-or-later
"""Reads a kernel's modules, their dependencies, and the list of built-in modules.

depmod writes `modules.dep` when a package is installed, so an unpacked package has none. The dependencies come from
`depends=` in the `.modinfo` section of each module instead, which the kernel's build writes.
"""

from __future__ import annotations

import gzip
import lzma
import struct
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path

from ..errors import GuestError
from ..search_path import find_program

_ZSTD_SECONDS = 30


class Modules:
    """The modules below a directory such as `/lib/modules/6.1.0-amd64`.

    Names have underscores instead of dashes, as in lsmod.
    """

    def __init__(self, directory: Path, *, version: str = "") -> None:
        """Find the modules in `directory`, which may be a build tree. `version` is the directory's name by default."""
        self.version = version or directory.name
        self._paths = {_name(path.name): path for path in _files(directory)}
        builtin = directory / "modules.builtin"
        lines = builtin.read_text().splitlines() if builtin.exists() else []
        self._builtin = {_name(line.rpartition("/")[2]) for line in lines}

    def missing(self, names: Iterable[str]) -> list[str]:
        """Return the names that are neither modules nor built in."""
        return [name for name in names if name not in self._paths and name not in self._builtin]

    def load(self, names: Iterable[str]) -> dict[str, Module]:
        """Read the modules that are not built in, and their dependencies, in loading order."""
        loaded: dict[str, Module] = {}
        for name in names:
            self._load(name, loaded)
        return loaded

    def _load(self, name: str, loaded: dict[str, Module]) -> None:
        if name in loaded or name not in self._paths:
            return
        module = Module(name, _read(self._paths[name]))
        for other in module.depends:
            self._load(other, loaded)
        loaded[name] = module


def _files(directory: Path) -> Iterator[Path]:
    """Yield the modules' files: in a build tree they are beside their sources, and modules.order lists them."""
    installed = directory / "kernel"
    order = directory / "modules.order"
    if directory.joinpath("Kconfig").exists() and order.exists():
        # Older kernels list .ko files, newer ones .o files.
        for line in order.read_text().splitlines():
            yield directory.joinpath(line).with_suffix(".ko")
    else:
        yield from installed.rglob("*.ko*")


class Module:
    """One module: its name, its uncompressed content, the kernel it was built for, its dependencies and aliases."""

    def __init__(self, name: str, content: bytes) -> None:
        self.name = name
        self.content = content
        information = modinfo(content)
        self.depends = [_name(other) for value in information.get("depends", []) for other in value.split(",") if other]
        #: The kernel's version, or an empty string if it is unknown.
        self.kernel = "".join(information.get("vermagic", [])).partition(" ")[0]
        self.aliases = information.get("alias", [])


def modules_dep(modules: dict[str, Module]) -> str:
    """Return the content of `modules.dep` for modules in the order of `load`, all in one directory.

    Each line lists all dependencies of a module, in reverse loading order.
    """
    needs: dict[str, list[str]] = {}
    for name, module in modules.items():
        others = [*module.depends, *(deeper for other in module.depends for deeper in needs.get(other, []))]
        needs[name] = [other for other in reversed(modules) if other in others]
    return "".join(f"{name}.ko:{''.join(f' {other}.ko' for other in others)}\n" for name, others in needs.items())


def modules_alias(modules: dict[str, Module]) -> str:
    """Return the content of `modules.alias` for these modules."""
    return "".join(f"alias {alias} {module.name}\n" for module in modules.values() for alias in module.aliases)


def modinfo(content: bytes) -> dict[str, list[str]]:
    """Read the `.modinfo` section of a 64-bit ELF object. Returns each key with its values in order."""
    found: dict[str, list[str]] = {}
    for entry in _section(content, b".modinfo").split(b"\0"):
        key, separator, value = entry.decode(errors="replace").partition("=")
        if separator:
            found.setdefault(key, []).append(value)
    return found


def _section(content: bytes, name: bytes) -> bytes:
    if content[:6] != b"\x7fELF\x02\x01":
        raise GuestError("a kernel module is not a 64-bit little-endian ELF object")
    (table,) = struct.unpack_from("<Q", content, 0x28)
    size, count, names = struct.unpack_from("<HHH", content, 0x3A)
    # The fields sh_name, sh_offset and sh_size of each Elf64_Shdr.
    headers = [struct.unpack_from("<I20xQQ", content, table + size * index) for index in range(count)]
    strings = headers[names][1]
    for offset, start, length in headers:
        if content.startswith(name + b"\0", strings + offset):
            return content[start : start + length]
    return b""


def _name(file_name: str) -> str:
    return file_name.partition(".ko")[0].replace("-", "_")


def _read(path: Path) -> bytes:
    match path.suffix:
        case ".ko":
            return path.read_bytes()
        case ".xz":
            return lzma.decompress(path.read_bytes())
        case ".gz":
            return gzip.decompress(path.read_bytes())
        case ".zst":
            return _zstd(path)
    raise GuestError(f"cannot read the kernel module {path}: unknown compression")


def _zstd(path: Path) -> bytes:
    if not find_program("zstd"):
        raise GuestError("cannot read the kernel's modules: zstd is not installed", hint="install the package zstd")
    try:
        return subprocess.run(
            ["zstd", "-dcq", str(path)], check=True, capture_output=True, timeout=_ZSTD_SECONDS
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise GuestError(f"cannot decompress the kernel module {path}: {error}") from error
