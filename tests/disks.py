# SPDX-License-Identifier: LGPL-2.1-or-later
"""Makes disk images that boot by BIOS (syslinux) or UEFI (systemd-boot). It needs no root privileges."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from vmspawn.guest.build import build

MIB = 1 << 20

_ESP = "C12A7328-F81F-11D2-BA4B-00A0C93EC93B"
_ROOT = "4F68BCE3-E8CD-4DB1-96E7-FBCAF984B709"
_ESP_START = 2048
_SECTOR = 512

#: The code of the first sector. It starts the partition with the attribute LegacyBIOSBootable.
_BOOT_CODE = Path("/usr/lib/syslinux/mbr/gptmbr.bin")

_PROGRAMS = {"syslinux": "syslinux", "mcopy": "mtools", "mkfs.vfat": "dosfstools", "sfdisk": "fdisk"}


def need_tools() -> None:
    """Skip the test if the programs that make the images are not installed."""
    for program, package in _PROGRAMS.items():
        if not shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin:/sbin"):
            pytest.skip(f"{program} is not installed (Debian: {package})")
    if not _BOOT_CODE.exists():
        pytest.skip(f"{_BOOT_CODE} is not installed (Debian: syslinux-common)")


def make_builtin_disk(path: Path) -> Path:
    """Make a disk with the built-in guest that BIOS boots."""
    need_tools()
    guest = build()
    return make_disk(path, Path(guest.kernel), Path(guest.initrd), ("console=ttyS0", *guest.arguments))


def make_disk(
    path: Path,
    kernel: Path,
    initrd: Path,
    arguments: tuple[str, ...],
    *,
    bios_arguments: tuple[str, ...] = (),
    boot_loader: Path | None = None,
    root: Path | None = None,
) -> Path:
    """Make a GPT disk with a boot partition and, if `root` is given, a root partition.

    `bios_arguments` are for the kernel if BIOS starts it. `boot_loader` is systemd-boot's PE image; without it the disk
    boots by BIOS alone.
    """
    esp = path.with_name(path.name + ".esp")
    size = (kernel.stat().st_size + initrd.stat().st_size) // MIB + 36
    _run("mkfs.vfat", "-C", "-h", str(_ESP_START), "-n", "ESP", str(esp), str(size * 1024))
    _copy(esp, kernel, "linux")
    _copy(esp, initrd, "initrd")
    line = " ".join(arguments)
    append = " ".join((line, *bios_arguments))
    _write(esp, "syslinux.cfg", f"DEFAULT linux\nLABEL linux\nLINUX /linux\nINITRD /initrd\nAPPEND {append}\n")
    if boot_loader is not None:
        _run("mmd", "-i", str(esp), "::EFI", "::EFI/BOOT", "::loader", "::loader/entries")
        _copy(esp, boot_loader, "EFI/BOOT/BOOTX64.EFI")
        _write(esp, "loader/loader.conf", "timeout 0\n")
        entry = f"title test\nlinux /linux\ninitrd /initrd\noptions {line}\n"
        _write(esp, "loader/entries/test.conf", entry)
    _run("syslinux", "--install", str(esp))
    _assemble(path, esp, root)
    esp.unlink()
    return path


def _assemble(path: Path, esp: Path, root: Path | None) -> None:
    esp_sectors = esp.stat().st_size // _SECTOR
    root_start = _ESP_START + esp_sectors
    root_sectors = root.stat().st_size // _SECTOR if root else 0
    with path.open("wb") as file:
        file.truncate((root_start + root_sectors + 2048) * _SECTOR)
    lines = ["label: gpt", f'start={_ESP_START}, size={esp_sectors}, type={_ESP}, attrs="LegacyBIOSBootable"']
    if root:
        lines.append(f"start={root_start}, size={root_sectors}, type={_ROOT}")
    subprocess.run([_which("sfdisk"), "--quiet", str(path)], input="\n".join(lines), text=True, check=True, timeout=60)
    with path.open("r+b") as file:
        file.write(_BOOT_CODE.read_bytes())
    for source, start in ((esp, _ESP_START), *([(root, root_start)] if root else [])):
        _run("dd", f"if={source}", f"of={path}", "bs=1M", f"seek={start * _SECTOR}", "oflag=seek_bytes", *_DD)


_DD = ("conv=notrunc,sparse", "status=none")


def _copy(esp: Path, source: Path, target: str) -> None:
    _run("mcopy", "-i", str(esp), str(source), f"::{target}")


def _write(esp: Path, target: str, text: str) -> None:
    subprocess.run([_which("mcopy"), "-i", str(esp), "-", f"::{target}"], input=text, text=True, check=True, timeout=60)


def _run(program: str, *arguments: str) -> None:
    done = subprocess.run([_which(program), *arguments], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, f"{program}: {done.stderr}"


def _which(program: str) -> str:
    found = shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    assert found, program
    return found
