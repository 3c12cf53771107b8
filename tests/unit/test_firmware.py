# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests finding firmware by QEMU's descriptors: the order of directories and files, machines, features."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import MIB
from tests.refusals import refused
from tests.small_disks import PAGE, small_disk
from tests.spawn_config import parse_config
from vmspawn.boot import firmware, nvram, uefi
from vmspawn.boot.firmware import Blob, FirmwareWish
from vmspawn.errors import StartError


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Make the user's and the system's directories of descriptors, both empty."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "user"))
    monkeypatch.setattr(firmware, "_SYSTEM", (str(tmp_path / "system"),))
    user, system = (tmp_path / name / "qemu/firmware" for name in ("user", "system"))
    user.mkdir(parents=True)
    system.mkdir(parents=True)
    return user, system


def descriptor(path: Path, *features: str, machines: str = "pc-q35-*", interface: str = "uefi", **changes: Any) -> Path:
    """Write a descriptor of a UEFI firmware. The executable has the descriptor's name."""
    content = {
        "description": path.stem,
        "interface-types": [interface],
        "mapping": {
            "device": "flash",
            "executable": {"filename": f"/{path.stem}.fd", "format": "raw"},
            "nvram-template": {"filename": f"/{path.stem}.vars", "format": "qcow2"},
        },
        "targets": [{"architecture": "x86_64", "machines": [machines]}],
        "features": list(features),
        "tags": [],
    }
    path.write_text(json.dumps({**content, **changes}))
    return path


def selected(wish: FirmwareWish | None = None, machine_type: str = "q35") -> str | None:
    """Return the path of the selected executable."""
    found = firmware.select(wish or FirmwareWish(), "x86_64", machine_type)
    return found.executable.path if found else None


def test_the_first_by_name_is_taken_whatever_its_directory(folders: tuple[Path, Path]) -> None:
    user, system = folders
    descriptor(user / "60-mine.json")
    descriptor(system / "50-theirs.json")
    assert selected() == "/50-theirs.fd"
    assert [Path(each).name for each in firmware.descriptors()] == ["50-theirs.json", "60-mine.json"]


def test_the_users_file_hides_the_systems_of_the_same_name(folders: tuple[Path, Path]) -> None:
    user, system = folders
    descriptor(system / "50-a.json")
    descriptor(user / "50-a.json", machines="pc-i440fx-*")
    assert selected() is None
    assert selected(machine_type="pc") == "/50-a.fd"


def test_an_empty_file_hides_and_offers_nothing(folders: tuple[Path, Path]) -> None:
    user, system = folders
    descriptor(system / "50-a.json")
    descriptor(system / "60-b.json")
    (user / "50-a.json").touch()
    assert selected() == "/60-b.fd"


def test_features_are_required_and_excluded(folders: tuple[Path, Path]) -> None:
    _, system = folders
    descriptor(system / "40-enrolled.json", "secure-boot", "enrolled-keys")
    descriptor(system / "50-secure.json", "secure-boot")
    descriptor(system / "60-plain.json")
    assert selected() == "/50-secure.fd"
    assert selected(FirmwareWish(exclude=("secure-boot",))) == "/60-plain.fd"
    assert selected(FirmwareWish(include=("enrolled-keys",))) == "/40-enrolled.fd"
    assert selected(FirmwareWish(include=("intel-tdx",))) is None


def test_descriptors_without_uefi_or_for_other_machines_are_skipped(folders: tuple[Path, Path]) -> None:
    _, system = folders
    descriptor(system / "10-bios.json", interface="bios")
    descriptor(system / "20-arm.json", targets=[{"architecture": "aarch64", "machines": ["virt-*"]}])
    (system / "30-broken.json").write_text("{")
    descriptor(system / "40-kernel.json", mapping={"device": "kernel", "filename": "/k"})
    descriptor(system / "50-memory.json", "intel-tdx", mapping={"device": "memory", "filename": "/m.fd"})
    assert selected() is None
    found = firmware.select(FirmwareWish(include=("intel-tdx",)), "x86_64", "q35")
    assert found is not None
    assert (found.executable, found.template, found.is_in_memory) == (Blob("/m.fd", "raw"), None, True)


def test_a_descriptor_that_the_user_names_must_fit(folders: tuple[Path, Path]) -> None:
    user, _ = folders
    path = str(descriptor(user / "99-x.json", machines="pc-i440fx-*"))
    assert selected(FirmwareWish(path), "pc") == "/99-x.fd"
    with pytest.raises(StartError, match="is not UEFI for x86_64 machines of type q35"):
        selected(FirmwareWish(path))
    with pytest.raises(StartError, match="has no secure-boot"):
        selected(FirmwareWish(path, include=("secure-boot",)), "pc")
    with pytest.raises(StartError, match="cannot read the firmware descriptor"):
        selected(FirmwareWish("/proc/nonexistent/x.json"))


@pytest.mark.parametrize(
    ("arguments", "wish"),
    [
        ([], FirmwareWish()),
        (["--secure-boot=yes"], FirmwareWish(include=("secure-boot",))),
        (["--secure-boot=no"], FirmwareWish(exclude=("enrolled-keys", "secure-boot"))),
        (
            ["--firmware-features=a,~b", "--firmware-features=c"],
            FirmwareWish("auto", ("a", "c"), ("enrolled-keys", "b")),
        ),
        (["--firmware-features=a", "--firmware-features="], FirmwareWish(exclude=())),
        (["--firmware-features=secure-boot", "--secure-boot=auto"], FirmwareWish()),
        (["--firmware="], FirmwareWish()),
        (["--efi-nvram-state=off"], FirmwareWish(nvram_state="off")),
        (["--efi-nvram-template=/t", "--efi-nvram-state=/s"], FirmwareWish(nvram_template="/t", nvram_state="/s")),
    ],
)
def test_firmware_options_are_parsed(arguments: list[str], wish: FirmwareWish) -> None:
    config = parse_config(["--image=/x", *arguments])
    assert config.firmware == wish


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--firmware=coreboot"], "--firmware=coreboot is not known"),
        (["--firmware=a/b.json"], "is not a path"),
        (["--firmware=none"], "--firmware=none boots nothing by itself"),
        (["--firmware=bios", "--secure-boot=yes"], "has none of the features secure-boot"),
        (["--firmware=bios", "--efi-nvram-state=/x"], "--efi-nvram-state= needs UEFI"),
        (["--secure-boot=maybe"], "neither yes nor no"),
        (["--efi-nvram-state=x"], "is not a path"),
    ],
)
def test_contradictory_firmware_options_are_refused_with_a_hint(arguments: list[str], message: str) -> None:
    with refused(message) as caught:
        parse_config(["--image=/x", *arguments])
    assert caught.value.hint


@pytest.mark.parametrize(
    "option",
    [
        "--firmware=uefi",
        "--secure-boot=yes",
        "--firmware-features=a",
        "--efi-nvram-template=/t",
        "--efi-nvram-state=/s",
    ],
)
def test_uefi_is_not_asked_to_start_a_kernel_that_it_cannot_start(
    folders: tuple[Path, Path], tmp_path: Path, option: str
) -> None:
    descriptor(folders[1] / "50-a.json", "secure-boot", "a")
    kernel = tmp_path / "kernel"
    kernel.write_bytes(b"no PE image")
    with refused(f"--.* needs UEFI, which cannot start {kernel}: it is not a PE image") as caught:
        uefi.choose(parse_config([f"--linux={kernel}", option]), "x86_64", print)
    assert caught.value.hint
    assert uefi.choose(parse_config([f"--linux={kernel}"]), "x86_64", print) is None


#: A kernel for x86 that is a PE image too, and an EFI program that is not a Linux kernel.
EFI_PROGRAM = (b"MZ".ljust(60, b"\0") + (64).to_bytes(4, "little") + b"PE\0\0").ljust(0x202, b"\0")
LINUX = EFI_PROGRAM + b"HdrS"


def test_a_kernel_that_qemu_can_start_is_started_by_uefi_only_on_request(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    descriptor(folders[1] / "50-a.json")
    kernel = tmp_path / "kernel"
    kernel.write_bytes(LINUX)
    directly = parse_config([f"--linux={kernel}", "--set-credential=a:b"])
    assert uefi.choose(directly, "x86_64", print) is None
    assert uefi.choose(parse_config([f"--linux={kernel}", "--firmware=uefi"]), "x86_64", print) is not None
    assert uefi.choose(parse_config(["--image=/x"]), "x86_64", print) is not None


def test_options_that_need_uefi_choose_uefi(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """A machine of type virt has SMBIOS only with UEFI."""
    targets = [{"architecture": "aarch64", "machines": ["virt-*"]}]
    descriptor(folders[1] / "50-a.json", targets=targets)
    kernel = tmp_path / "kernel"
    kernel.write_bytes(LINUX)
    virt = ["--machine-type=virt", f"--linux={kernel}"]
    assert uefi.choose(parse_config(virt), "aarch64", print) is None
    for option in ("--set-credential=a:b", "--smbios11=x", "--bind=/tmp"):
        assert uefi.choose(parse_config([*virt, option]), "aarch64", print) is not None


def test_an_efi_program_needs_uefi(folders: tuple[Path, Path], tmp_path: Path) -> None:
    program = tmp_path / "shell.efi"
    program.write_bytes(EFI_PROGRAM)
    with pytest.raises(StartError, match="no UEFI firmware") as missing:
        uefi.choose(parse_config([f"--linux={program}"]), "x86_64", print)
    assert missing.value.hint == "install it (Debian: ovmf, Fedora: edk2-ovmf)"
    with refused(f"{program} is an EFI program, which --firmware=none cannot start"):
        uefi.choose(parse_config([f"--linux={program}", "--firmware=none"]), "x86_64", print)
    descriptor(folders[1] / "50-a.json")
    assert uefi.choose(parse_config([f"--linux={program}"]), "x86_64", print) is not None


def test_a_file_for_the_variables_requires_uefi(folders: tuple[Path, Path]) -> None:
    config = parse_config(["--guest=builtin", "--efi-nvram-state=/s"])
    with pytest.raises(StartError, match="no UEFI firmware"):
        uefi.choose(config, "x86_64", print)
    descriptor(folders[1] / "50-a.json")
    found = uefi.choose(config, "x86_64", print)
    assert found is not None
    assert found.executable.path == "/50-a.fd"
    assert uefi.choose(parse_config(["--guest=builtin"]), "x86_64", print) is None


def test_the_variables_are_kept_beside_the_image_unless_they_end_with_the_machine(tmp_path: Path) -> None:
    image = str(tmp_path / "a.raw")
    auto = FirmwareWish()
    assert nvram.state_path(auto, image, ephemeral=False) == image + ".efinvramstate"
    assert nvram.state_path(auto, image, ephemeral=True) is None
    assert nvram.state_path(auto, None, ephemeral=False) is None
    assert nvram.state_path(FirmwareWish(nvram_state="off"), image, ephemeral=False) is None
    assert nvram.state_path(FirmwareWish(nvram_state="/s"), image, ephemeral=True) == "/s"


def test_variables_begin_as_the_template_and_are_kept(tmp_path: Path) -> None:
    template, state = tmp_path / "template", tmp_path / "state"
    template.write_bytes(b"new")
    with open(nvram.open_state(str(state), Blob(str(template), "raw")), "r+b") as file:
        assert file.read() == b""  # the offset is at the end of the copy
        file.write(b" and changed")
    assert state.read_bytes() == b"new and changed"
    assert state.stat().st_mode & 0o777 == 0o600
    with open(nvram.open_state(str(state), Blob(str(template), "raw")), "rb") as file:
        assert file.read() == b"new and changed"
    assert {each.name for each in tmp_path.iterdir()} == {"template", "state"}


def test_a_template_that_cannot_be_read_leaves_no_variables(tmp_path: Path) -> None:
    with pytest.raises(StartError, match="cannot copy the UEFI variables' template"):
        nvram.open_state(str(tmp_path / "state"), Blob("/proc/nonexistent", "raw"))
    with pytest.raises(StartError, match="cannot create the UEFI variables"):
        nvram.open_state(str(tmp_path / "none" / "state"), Blob("/proc/nonexistent", "raw"))
    assert list(tmp_path.iterdir()) == []


def test_variables_that_do_not_fit_on_the_disk_get_no_name(tmp_path: Path) -> None:
    template = tmp_path / "template"
    template.write_bytes(bytes(16 * PAGE))
    with small_disk(tmp_path / "small", MIB) as small:
        path = small.folder / "image.efinvramstate"
        small.fill(pages_left=4)
        with pytest.raises(StartError, match="No space left on device"):
            nvram.open_state(str(path), Blob(str(template), "raw"))
        assert list(small.folder.iterdir()) == []
        small.empty()
        os.close(nvram.open_state(str(path), Blob(str(template), "raw")))
        assert path.read_bytes() == template.read_bytes()
