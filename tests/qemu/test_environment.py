# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests unusual environments: an unusable runtime directory, another locale, few permissions."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.commands import DEADLINE, VMCTL, VMSPAWN, idle, one_line
from tests.conftest import make_raw
from vmspawn.boot.qemu import find_qemu

#: A locale in which Python neither assumes UTF-8 nor corrects the locale. systemd's units and cron have this locale.
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )


def test_a_runtime_directory_that_cannot_be_read_is_not_an_empty_list(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = run(*VMCTL, "list", VMSPAWN_RUNTIME_DIR=str(tmp_path / "file"))
    assert done.returncode == 1
    assert one_line(done, "vmctl") == f"vmctl: cannot read the runtime directory {tmp_path}/file: Not a directory"
    assert run(*VMCTL, "list", VMSPAWN_RUNTIME_DIR=str(tmp_path / "none")).returncode == 0
    completed = run(*VMCTL, "__complete", "machines", VMSPAWN_RUNTIME_DIR=str(tmp_path / "file"))
    assert (completed.returncode, completed.stdout, completed.stderr) == (0, "", "")


def test_a_machine_that_cannot_be_inspected_is_listed(tmp_path: Path) -> None:
    """A link to itself cannot be followed, like a directory of another user. A file is not a machine."""
    (tmp_path / "other").symlink_to("other")
    (tmp_path / "file").touch()
    listed = run(*VMCTL, "list", VMSPAWN_RUNTIME_DIR=str(tmp_path))
    assert [line.split()[:2] for line in listed.stdout.splitlines()[1:]] == [["other", "unreachable"]], listed.stderr
    refused = run(*VMCTL, "status", "other", VMSPAWN_RUNTIME_DIR=str(tmp_path))
    assert refused.returncode == 1
    assert one_line(refused, "vmctl").startswith("vmctl: cannot reach machine other: ")


def test_a_removed_current_directory_is_reported(tmp_path: Path) -> None:
    script = 'mkdir gone && cd gone && rmdir ../gone && exec "$@"'
    done = subprocess.run(
        ["sh", "-c", script, "sh", *VMSPAWN, "--image=image"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )
    assert done.returncode == 1
    assert one_line(done, "vmspawn") == "vmspawn: the current directory was removed: No such file or directory"


def test_a_runtime_directory_that_cannot_be_made_is_noticed_before_the_guest_is_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    places = {"VMSPAWN_RUNTIME_DIR": str(tmp_path / "file" / "run"), "VMSPAWN_CACHE_DIR": str(tmp_path / "cache")}
    done = run(*VMSPAWN, "--guest=builtin", **places)
    assert done.returncode == 1
    assert (
        one_line(done, "vmspawn") == f"vmspawn: cannot use the runtime directory {tmp_path}/file/run: Not a directory"
    )
    assert "VMSPAWN_RUNTIME_DIR" in done.stderr
    assert not (tmp_path / "cache").exists()


def test_a_qmp_argument_is_utf8_whatever_the_locale(qemu: str, tmp_path: Path) -> None:
    with idle(qemu, tmp_path) as machine:
        done = run(*VMCTL, "qmp", machine.name, "qom-list", "path=/böse", **ASCII)
    assert done.returncode == 1
    assert r"Device '/b\xf6se' not found" in done.stderr


def test_a_directory_whose_kernel_cannot_mount_it_is_reported_beforehand(qemu: str, tmp_path: Path) -> None:
    boot = tmp_path / "boot"
    boot.mkdir()
    (boot / "vmlinuz-6.1").write_bytes(b"kernel")
    (boot / "config-6.1").write_text("# CONFIG_VIRTIO_FS is not set\n")
    done = run(*VMSPAWN, f"--qemu={qemu}", f"--directory={tmp_path}", "--qemu-arg=-nonsense")
    assert done.returncode == 1
    assert f"the guest may not find its root: {boot}/vmlinuz-6.1 was built without virtiofs" in done.stderr


def test_a_kernel_of_another_architecture_is_refused(qemu: str, tmp_path: Path) -> None:
    """QEMU would load the kernel, and the guest would hang silently."""
    header = b"MZ".ljust(60, b"\0") + (64).to_bytes(4, "little") + b"PE\0\0\x64\xaa"
    kernel = tmp_path / "kernel"
    kernel.write_bytes(header.ljust(4096, b"\0"))
    done = run(*VMSPAWN, f"--qemu={qemu}", f"--linux={kernel}")
    assert done.returncode == 1
    assert f"{kernel} is a kernel for aarch64, and --machine-type=q35 is x86_64" in done.stderr


def test_a_user_without_a_home_boots_an_image(qemu: str, tmp_path: Path) -> None:
    """Nothing is cached then. HOME is not a path, so that the password database is not used."""
    image = make_raw(tmp_path / "image", 1 << 20)
    options = (f"--qemu={qemu}", f"--image={image}", "--ram=64M", "--console=headless", "--time-limit=1")
    done = run(*VMSPAWN, *options, HOME="none", XDG_CACHE_HOME="", VMSPAWN_CACHE_DIR="")
    assert done.returncode == 124, done.stderr
    assert not Path("none").exists()


@pytest.mark.parametrize("environment", [{}, ASCII], ids=["utf-8", "ascii"])
def test_a_boot_entry_names_its_files_in_any_locale(tmp_path: Path, environment: dict[str, str]) -> None:
    entries = tmp_path / "boot" / "loader" / "entries"
    entries.mkdir(parents=True)
    (tmp_path / "boot" / "linüx").touch()
    (entries / "a.conf").write_text("title a\nlinux /linüx\n", encoding="utf-8")
    done = run(*VMSPAWN, f"--directory={tmp_path}", "--kvm=no", **environment)
    assert done.returncode == 1
    assert one_line(done, "vmspawn").endswith("the file is empty")


def test_a_busy_host_gets_all_answers_of_a_probe(qemu: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """QEMU's answers are larger than a pipe, and QEMU exits without writing the part that a full pipe rejects."""
    monkeypatch.setenv("VMSPAWN_CACHE_DIR", str(tmp_path))
    with ThreadPoolExecutor(8) as threads:
        found = set(threads.map(find_qemu, [qemu] * 8))
    assert len(found) == 1
