# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests guests that UEFI starts: firmware descriptors, variables beside the image, Secure Boot, and refusals."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import ovmf
from tests.commands import VMSPAWN, Spawned
from tests.conftest import make_raw
from tests.disks import make_disk, need_tools
from tests.machines import fresh_name
from vmspawn.guest.build import build

#: Seconds. UEFI takes about ten seconds under emulation on an idle host.
BOOT_TIMEOUT = 110.0

#: Options for firmware that supports Secure Boot, without a file for its variables.
SECURE = ("--secure-boot=yes", "--efi-nvram-state=off")

#: Options for firmware with enrolled keys, which enforces Secure Boot.
ENROLLED = (*SECURE, "--firmware-features=enrolled-keys")


@pytest.fixture
def config_home(tmp_path: Path) -> Path:
    """Make a user's configuration directory with descriptors of UEFI firmware."""
    ovmf.install(tmp_path / "config")
    return tmp_path / "config"


@pytest.fixture
def kernel() -> tuple[str, ...]:
    """Return the options that boot the built-in guest's kernel with --linux=."""
    guest = build()
    arguments = [each for each in guest.arguments if each != "quiet"]
    return ("--ram=512M", f"--linux={guest.kernel}", f"--initrd={guest.initrd}", *arguments, "loglevel=7")


def run(config_home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*VMSPAWN, *arguments],
        env=ovmf.environment(config_home),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.fixture
def spawn(config_home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Spawned]]:
    """Return a list of started machines, which are ended on exit."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(config_home))
    machines: list[Spawned] = []
    yield machines
    for each in machines:
        each.close()


def boot(spawn: list[Spawned], *arguments: str, until: str = "vmspawn-guest: ready") -> Spawned:
    """Start a machine, and wait until its console shows a text."""
    machine = Spawned(fresh_name(), arguments)
    spawn.append(machine)
    machine.wait_for(until, stream="stdout", timeout=BOOT_TIMEOUT)
    return machine


def test_a_kernel_is_started_by_uefi_if_the_user_asks_for_it(
    qemu: str, spawn: list[Spawned], kernel: tuple[str, ...], tmp_path: Path
) -> None:
    image = make_raw(tmp_path / "image.raw", 1 << 20)
    machine = boot(spawn, f"--qemu={qemu}", f"--image={image}", "--firmware=uefi", *kernel)
    assert "efi: EFI v" in machine.output["stdout"]
    assert "root=/dev/vda" in machine.output["stdout"]
    assert (tmp_path / "image.raw.efinvramstate").stat().st_size > 0


@pytest.mark.soak
def test_secure_boot_is_on_with_enrolled_keys(qemu: str, spawn: list[Spawned], kernel: tuple[str, ...]) -> None:
    """The firmware with keys needs system management mode to start."""
    machine = boot(spawn, f"--qemu={qemu}", *ENROLLED, *kernel)
    assert "secureboot: Secure boot enabled" in machine.output["stdout"]


@pytest.mark.soak
def test_secure_boot_is_off_without_keys(qemu: str, spawn: list[Spawned], kernel: tuple[str, ...]) -> None:
    """As in systemd-vmspawn, the option requires firmware that supports Secure Boot; keys are a separate feature."""
    machine = boot(spawn, f"--qemu={qemu}", *SECURE, *kernel)
    assert "secureboot: Secure boot disabled" in machine.output["stdout"]


@pytest.fixture
def unsigned(tmp_path: Path) -> Path:
    """Make a disk whose boot loader is a kernel without a signature that the firmware accepts."""
    need_tools()
    guest = build()
    kernel = Path(guest.kernel)
    return make_disk(tmp_path / "unsigned.raw", kernel, Path(guest.initrd), (), boot_loader=kernel)


@pytest.mark.soak
@pytest.mark.parametrize(
    ("firmware", "said"),
    [
        pytest.param(SECURE, 'starting Boot0001 "UEFI Misc Device"', id="without keys"),
        pytest.param(ENROLLED, "Access Denied", id="with keys"),
    ],
)
def test_only_firmware_with_keys_refuses_a_loader_that_it_has_no_key_for(
    qemu: str, spawn: list[Spawned], unsigned: Path, firmware: tuple[str, ...], said: str
) -> None:
    boot(spawn, f"--qemu={qemu}", "--ram=512M", f"--image={unsigned}", *firmware, until=said)


def test_by_default_qemu_starts_a_kernel_directly_and_the_kernel_gets_its_disk(
    qemu: str, spawn: list[Spawned], kernel: tuple[str, ...], tmp_path: Path
) -> None:
    """UEFI is installed, but would take several times as long."""
    image = make_raw(tmp_path / "image.raw", 1 << 20)
    machine = boot(spawn, f"--qemu={qemu}", f"--image={image}", *kernel)
    assert "efi: EFI v" not in machine.output["stdout"]
    assert "root=/dev/vda" in machine.output["stdout"]
    assert [each.name for each in tmp_path.iterdir() if each.is_file()] == ["image.raw"]


def test_firmware_is_listed_and_described(config_home: Path) -> None:
    listed = run(config_home, "--firmware=list").stdout.split()
    assert [Path(each).name for each in listed][-1] == "60-edk2-x86_64.json"
    assert "secure-boot" in run(config_home, "--firmware-features=list").stdout.split()
    described = json.loads(run(config_home, "--firmware=describe", "--secure-boot=no").stdout)
    assert "secure-boot" not in described["features"]
    assert "uefi" in described["interface-types"]
    enrolled = run(config_home, "--firmware=describe", "--secure-boot=yes", "--firmware-features=enrolled-keys")
    assert {"enrolled-keys", "secure-boot"} <= set(json.loads(enrolled.stdout)["features"])


def test_missing_uefi_is_an_error_if_an_option_requires_it(tmp_path: Path) -> None:
    image = make_raw(tmp_path / "image", 1 << 20)
    hidden = tmp_path / "config"
    for path in ovmf.install(hidden).iterdir():
        path.write_text("")
    for arguments in (["--firmware=uefi"], ["--secure-boot=yes"], ["--firmware-features=intel-tdx"]):
        done = run(hidden, f"--image={image}", *arguments)
        assert done.returncode == 1
        assert "no UEFI firmware" in done.stderr
        assert "install it" in done.stderr


def test_a_variables_file_that_cannot_be_created_is_named(qemu: str, config_home: Path, tmp_path: Path) -> None:
    image = make_raw(tmp_path / "image", 1 << 20)
    done = run(config_home, f"--image={image}", f"--qemu={qemu}", f"--efi-nvram-state={tmp_path}/none/state")
    assert done.returncode == 1
    assert f"cannot create the UEFI variables {tmp_path}/none/state" in done.stderr


@pytest.mark.skipif(not shutil.which("qemu-system-aarch64"), reason="qemu-system-aarch64 is not installed")
@pytest.mark.parametrize("option", ["--set-credential=a:b", "--smbios11=x"])
def test_options_that_need_uefi_are_refused_without_it(tmp_path: Path, option: str) -> None:
    kernel = tmp_path / "kernel"
    kernel.write_bytes(b"no PE image")
    done = run(tmp_path, "--machine-type=virt", f"--linux={kernel}", option)
    assert done.returncode == 1
    assert f"{option.partition('=')[0]}= needs UEFI on machines of type virt" in done.stderr
