# SPDX-License-Identifier: LGPL-2.1-or-later
"""Makes a Debian system for tests: a directory tree (debootstrap) and a disk for BIOS and UEFI. Both are cached."""

import fcntl
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests import disks
from tests.interop.box import mirror
from tests.ovmf import cache

SUITE = "trixie"
#: Debian 12. Its systemd 252 accepts SSH keys as credentials, but not units.
OLDER = "bookworm"
PACKAGES = ("systemd", "systemd-sysv", "udev", "dbus", "systemd-boot-efi", "e2fsprogs", "ca-certificates")

#: dracut makes an initrd that can mount a root by virtiofs; debootstrap's default is initramfs-tools.
KERNEL_PACKAGES = ("dracut", "linux-image-cloud-amd64")

MIB = 1 << 20
MAKE_TIMEOUT = 1800.0

#: The label of the root file system, for the kernel's root= argument.
LABEL = "debian"


def need() -> None:
    """Skip the test if the tree cannot be made."""
    if os.geteuid() != 0:
        pytest.skip("debootstrap needs root")
    if not shutil.which("debootstrap") and not (cache() / f"debian-{SUITE}").exists():
        pytest.skip("debootstrap is not installed")
    disks.need_tools()


@contextmanager
def _locked(name: str) -> Iterator[None]:
    with (cache() / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def tree(suite: str = SUITE) -> Path:
    """Return the tree. Booting it writes to it, so tests must not depend on its exact content."""
    final = cache() / f"debian-{suite}"
    with _locked(final.name):
        if not final.exists():
            partial = final.with_name(final.name + ".partial")
            shutil.rmtree(partial, ignore_errors=True)
            _run("debootstrap", "--variant=minbase", f"--include={','.join(PACKAGES)}", suite, str(partial), mirror())
            for each in Path("/etc/apt/apt.conf.d").glob("*proxy*"):
                shutil.copy(each, partial / "etc/apt/apt.conf.d")
            _run("chroot", str(partial), "apt-get", "update")
            _run("chroot", str(partial), "apt-get", "install", "-y", "--no-install-recommends", *KERNEL_PACKAGES)
            partial.rename(final)
    return final


def cloud_tree(suite: str = SUITE) -> Path:
    """Return a tree with the software of a cloud image: an SSH server, cloud-init and systemd-networkd."""
    source = tree(suite)
    final = cache() / f"debian-{suite}-cloud"
    with _locked(final.name):
        if not final.exists():
            partial = final.with_name(final.name + ".partial")
            shutil.rmtree(partial, ignore_errors=True)
            _run("cp", "-a", str(source), str(partial))
            install = (
                "apt-get",
                "install",
                "-y",
                "--no-install-recommends",
                "openssh-server",
                "cloud-init",
                "iproute2",
            )
            _run("chroot", str(partial), *install)
            _run("chroot", str(partial), "systemctl", "enable", "systemd-networkd")
            partial.rename(final)
    return final


def kernel(suite: str = SUITE) -> tuple[Path, Path]:
    """Return the tree's kernel and initrd."""
    boot = tree(suite) / "boot"
    return next(boot.glob("vmlinuz-*")), next(boot.glob("initrd.img-*"))


def root(path: Path, source: Path) -> Path:
    """Make a file system image from a tree."""
    with path.open("wb") as file:
        file.truncate(1536 * MIB)
    _run("mkfs.ext4", "-q", "-L", LABEL, "-d", str(source), str(path))
    return path


def disk() -> Path:
    """Return the disk, in raw format. Tests boot it with --ephemeral, or boot a copy."""
    final = cache() / f"debian-{SUITE}.raw"
    source = tree()
    with _locked(final.name):
        if not final.exists():
            with tempfile.TemporaryDirectory(dir=cache()) as folder:
                _make_disk(source, Path(folder), final)
    return final


def _make_disk(source: Path, folder: Path, final: Path) -> None:
    linux, initrd = kernel()
    # With UEFI, vmspawn passes the console's arguments; with BIOS, the disk must have them.
    made = disks.make_disk(
        folder / "disk",
        linux,
        initrd,
        (f"root=LABEL={LABEL}", "rw"),
        bios_arguments=("console=ttyS0",),
        boot_loader=source / "usr/lib/systemd/boot/efi/systemd-bootx64.efi",
        root=root(folder / "root", source),
    )
    made.rename(final)


def _run(*command: str) -> None:
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}
    done = subprocess.run(
        command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=MAKE_TIMEOUT
    )
    if done.returncode != 0:
        lines = (done.stderr or done.stdout).strip().splitlines()
        pytest.skip(f"no Debian for tests: {command[0]} failed: {lines[-1] if lines else done.returncode}")
