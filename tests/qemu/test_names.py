# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests files with names that are not text, or that contain control sequences."""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.commands import DEADLINE, VMCTL, VMSPAWN, Spawned, one_line, spawned, vmctl, vmspawn
from tests.conftest import make_raw

ODD = os.fsdecode(b"odd\xff\n\x1b[31m.img")
SPELT = r"odd\xff\n\x1b[31m.img"


@pytest.fixture(scope="module")
def machine(qemu: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Spawned]:
    """Run a machine that boots from a file with an unusual name."""
    image = make_raw(tmp_path_factory.mktemp("boot") / ODD, 1 << 20)
    with spawned(f"--qemu={qemu}", f"--image={image}", "--ram=64M", "--console=headless") as running:
        running.wait_for("is running")
        yield running


def test_disks_are_attached_replaced_listed_and_detached(machine: Spawned, tmp_path: Path) -> None:
    name = machine.name
    (tmp_path / "other").mkdir()
    disk, other = make_raw(tmp_path / f"1{ODD}", 1 << 20), make_raw(tmp_path / "other" / ODD, 1 << 20)
    attached = vmctl("attach-disk", name, str(disk), "--bus=virtio-scsi")
    assert attached.stdout.startswith(rf"Attached 1{SPELT} on virtio-scsi at ")
    replaced = vmctl("replace-disk", name, f"1{SPELT}", str(other))
    assert replaced.stdout == f"Replaced the image of 1{SPELT} by {tmp_path}/other/{SPELT}, 1M\n"
    table = vmctl("list-disks", name).stdout.splitlines()
    assert len(table) == 3
    assert all(line.isprintable() for line in table)
    # JSON has the path itself; only the bytes that JSON cannot represent are escaped.
    paths = [each["path"] for each in json.loads(vmctl("list-disks", name, "--json=short").stdout)]
    assert paths[1] == f"{tmp_path}/other/odd\\xff\n\x1b[31m.img"
    assert vmctl("detach-disk", name, f"1{SPELT}").returncode == 0


@pytest.mark.parametrize("name", [f"3{ODD}", f"3{SPELT}"], ids=["as the file", "as it is shown"])
def test_every_verb_takes_the_name_in_both_spellings(machine: Spawned, tmp_path: Path, name: str) -> None:
    disk, other = make_raw(tmp_path / f"3{ODD}", 1 << 20), make_raw(tmp_path / "other", 1 << 20)
    verbs = (
        ("attach-disk", str(disk), "--bus=virtio-scsi"),
        ("resize-disk", name, "+1M"),
        ("limit-disk", name, "--iops=5"),
        ("replace-disk", name, str(other), "--shrink"),
        ("detach-disk", name),
        ("attach-disk", str(disk), "--bus=scsi-cd", f"--name={name}"),
        ("eject-media", name),
        ("insert-media", name, str(other)),
        ("detach-disk", name),
    )
    for verb, *arguments in verbs:
        done = vmctl(verb, machine.name, *arguments)
        assert (done.returncode, done.stderr) == (0, ""), verb


def test_characters_that_the_locale_lacks_are_escaped(machine: Spawned, tmp_path: Path) -> None:
    disk = make_raw(tmp_path / "größe.img", 1 << 20)
    environment = {**os.environ, "PYTHONUTF8": "0", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}

    def shown(*arguments: str) -> bytes:
        done = subprocess.run([*VMCTL, *arguments], capture_output=True, env=environment, timeout=DEADLINE, check=False)
        assert (done.returncode, done.stderr) == (0, b"")
        return done.stdout

    assert rb"gr\xf6\xdfe.img" in shown("attach-disk", machine.name, str(disk), "--bus=virtio-scsi")
    paths = [each["path"] for each in json.loads(vmctl("list-disks", machine.name, "--json=short").stdout)]
    assert str(disk) in paths
    assert rb"gr\xf6\xdfe.img" in shown("list-disks", machine.name, "-l")
    assert shown("detach-disk", machine.name, "größe.img") == b"Detached gr\\xf6\\xdfe.img\n"


def test_an_error_about_an_unusual_name_is_one_line(machine: Spawned, tmp_path: Path) -> None:
    missing = vmctl("attach-disk", machine.name, str(tmp_path / ODD))
    assert one_line(missing, "vmctl") == f"vmctl: cannot attach {tmp_path}/{SPELT}: No such file or directory"
    unknown = vmctl("detach-disk", machine.name, f"2{ODD}")
    assert one_line(unknown, "vmctl") == f"vmctl: cannot detach 2{SPELT}: there is no disk named 2{SPELT}"
    image = vmspawn(f"--image={tmp_path / ODD}")
    assert one_line(image, "vmspawn") == f"vmspawn: cannot use --image={tmp_path}/{SPELT}: No such file or directory"


def test_options_may_contain_bytes_that_are_not_text(qemu: str, tmp_path: Path) -> None:
    """QEMU gets the bytes, and exits because of another option. Only a virtiofsd written in Rust refuses them."""
    image = make_raw(tmp_path / "image", 1 << 20)
    (tmp_path / ODD).mkdir()
    options = (f"--image={image}", f"--qemu={qemu}", "--qemu-arg=-nonsense", "--console=headless")
    for odd in (ODD, f"--bind={tmp_path / ODD}", f"--set-credential=name:{ODD}", f"--smbios11={ODD}"):
        said = one_line(vmspawn(*options, odd), "vmspawn")
        refused = odd.startswith("--bind=") and "supports UTF-8 names only" in said
        assert refused or "-nonsense: invalid option" in said


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
@pytest.mark.parametrize("program", [VMCTL, VMSPAWN], ids=["vmctl", "vmspawn"])
def test_characters_of_the_help_that_the_encoding_lacks_are_escaped(program: list[str], encoding: str) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run([*program, "--help"], capture_output=True, env=environment, timeout=DEADLINE, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert rb"OPTION\u2026" in done.stdout
