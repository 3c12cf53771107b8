# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests the built-in guest on a user's kernel, and commands in a directory of the host.

The kernel is a copy of the built-in guest's kernel, with its modules in a directory.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.commands import DEADLINE, VMSPAWN, make_script, one_line, run_example, spawned, vmctl, vmspawn
from tests.machines import fresh_name, is_gone
from tests.unit.test_archive import MIB, look, make_sparse, tree
from vmspawn.errors import StartError
from vmspawn.guest import builtin
from vmspawn.guest.build import build
from vmspawn.helpers import virtiofsd
from vmspawn.images import kernel_image

__all__ = ["tree"]


def has_virtiofsd() -> bool:
    try:
        return bool(virtiofsd.find())
    except StartError:
        return False


needs_virtiofsd = pytest.mark.skipif(not has_virtiofsd(), reason="virtiofsd is not installed")


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Return a kernel and the directory of its modules, both from the built-in guest."""
    folder = tmp_path_factory.mktemp("kernel")
    guest = builtin.find() or build()
    image = shutil.copy(guest.kernel, folder / "vmlinuz")
    with open(guest.initrd, "rb") as file:
        subprocess.run(
            ["busybox", "cpio", "-id", "lib/modules/*"], stdin=file, cwd=folder, check=True, capture_output=True
        )
    modules = folder / "lib/modules" / kernel_image.version_of(guest.kernel)
    (modules / "kernel").mkdir()
    for path in modules.glob("*.ko"):
        path.rename(modules / "kernel" / path.name)
    return str(image), str(modules)


def run(
    qemu: str, command: str, *options: str, folder: Path | None = None, data: bytes = b""
) -> subprocess.CompletedProcess[bytes]:
    arguments = [*VMSPAWN, "-M", fresh_name(), f"--qemu={qemu}", "--guest=builtin", f"--run={command}", *options]
    return subprocess.run(arguments, input=data, capture_output=True, timeout=2 * DEADLINE, check=False, cwd=folder)


def test_the_guest_runs_on_the_users_kernel_with_its_modules(qemu: str, kernel: tuple[str, str]) -> None:
    linux, modules = kernel
    command = "uname -r; cat /etc/modules; grep -c . /proc/modules"
    done = run(qemu, command, f"--linux={linux}", f"--modules={modules}")
    assert done.returncode == 0, done.stderr
    release, *names, count = done.stdout.decode().split()
    assert release == kernel_image.version_of(linux)
    assert "virtio_blk" in names
    assert int(count) >= len(names)


@needs_virtiofsd
def test_a_command_runs_in_the_hosts_userland_and_changes_only_the_guest(
    qemu: str, kernel: tuple[str, str], tmp_path: Path
) -> None:
    """The command starts in the directory in which vmspawn was started."""
    linux, modules = kernel
    (tmp_path / "file").write_text("of the host\n")
    command = "pwd; cat file - ; python3 -c 'print(6 * 7)'; echo changed >file; cat file; exit 3"
    done = run(
        qemu, command, f"--linux={linux}", f"--modules={modules}", "--directory=/", folder=tmp_path, data=b"typed\n"
    )
    assert (done.returncode, done.stderr) == (3, b"")
    assert done.stdout.decode() == f"{tmp_path}\nof the host\ntyped\n42\nchanged\n"
    assert (tmp_path / "file").read_text() == "of the host\n"


@needs_virtiofsd
def test_a_command_writes_to_another_tree_with_directory_rw(qemu: str, tmp_path: Path) -> None:
    """The tree has only busybox. The guest runs on its own kernel."""
    for name in ("bin", "proc", "sys", "dev", "run", "work"):
        (tmp_path / name).mkdir()
    shutil.copy(shutil.which("busybox") or "", tmp_path / "bin" / "busybox")
    (tmp_path / "bin" / "sh").symlink_to("busybox")
    options = (f"--directory={tmp_path}", "--directory-rw")
    done = run(qemu, "pwd; echo written >result; unshare -m true", *options, folder=tmp_path / "work")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"/work\n", b"")
    assert (tmp_path / "work" / "result").read_text() == "written\n"


@pytest.mark.soak
@needs_virtiofsd
def test_files_are_copied_by_the_userlands_own_tools(qemu: str, tree: Path, tmp_path: Path) -> None:
    """The tools are the host's tar, mv and dd."""
    os.utime(tree / "empty", (0, 0))
    options = ("--guest=builtin", f"--qemu={qemu}", "--directory=/", "--console=headless")
    with spawned(*options) as machine:
        machine.wait_for("is running")
        done = vmctl("wait", machine.name, "--for=booted")
        assert (done.returncode, done.stderr) == (0, "")
        for source, target in (
            (str(tree), f"{machine.name}:/mnt/there"),
            (f"{machine.name}:/mnt/there", f"{tmp_path}/back"),
        ):
            done = vmctl("copy", source, target)
            assert (done.returncode, done.stderr) == (0, "")
        sparse = make_sparse(tmp_path / "sparse")
        assert vmctl("copy", str(sparse), f"{machine.name}:/mnt").returncode == 0
        assert vmctl("copy", f"{machine.name}:/mnt/sparse", str(tmp_path / "again")).returncode == 0
    assert look(tmp_path / "back") == look(tree)
    assert (tmp_path / "again").read_bytes() == sparse.read_bytes()
    assert (tmp_path / "again").stat().st_blocks * 512 < 2 * MIB


def test_a_kernel_that_lacks_a_required_option_is_not_started(
    qemu: str, kernel: tuple[str, str], tmp_path: Path
) -> None:
    linux, modules = kernel
    image = tmp_path / "arch/x86/boot/bzImage"
    image.parent.mkdir(parents=True)
    shutil.copy(linux, image)
    (tmp_path / ".config").write_text("CONFIG_PCI=y\nCONFIG_TMPFS=y\n")
    name = fresh_name()
    done = vmspawn(
        "-M", name, f"--qemu={qemu}", "--guest=builtin", f"--linux={image}", f"--modules={modules}", "--run=true"
    )
    assert done.returncode == 1
    assert "lacks CONFIG_BLK_DEV_INITRD" in one_line(done, "vmspawn")
    assert is_gone(name)


def without(modules: str, folder: Path, *names: str) -> Path:
    """Copy a kernel's modules into `folder`, except those with these names."""
    copy = folder / os.path.basename(modules)
    shutil.copytree(modules, copy, ignore=shutil.ignore_patterns(*(f"{name}.ko" for name in names)))
    return copy


@needs_virtiofsd
def test_a_kernel_without_virtiofs_is_reported_from_the_guest(
    qemu: str, kernel: tuple[str, str], tmp_path: Path
) -> None:
    """vmspawn cannot know this before the start: without the kernel's configuration, the option may be built in."""
    linux, modules = kernel
    copy = without(modules, tmp_path, "virtiofs", "overlay")
    done = run(qemu, "true", f"--linux={linux}", f"--modules={copy}", "--directory=/")
    if done.returncode == 0:
        pytest.skip("this kernel has virtiofs and overlay built in")
    assert done.returncode == 125
    assert b"the kernel lacks CONFIG_" in done.stderr


def test_a_kernel_without_ports_ends_the_command(qemu: str, kernel: tuple[str, str], tmp_path: Path) -> None:
    linux, modules = kernel
    copy = without(modules, tmp_path, "virtio_console")
    done = run(qemu, "true", f"--linux={linux}", f"--modules={copy}")
    if done.returncode == 0:
        pytest.skip("this kernel has virtio_console built in")
    assert done.returncode == 125
    assert b"the kernel lacks CONFIG_VIRTIO_CONSOLE: the guest cannot run commands for the host" in done.stderr


@pytest.fixture
def build_tree(kernel: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a kernel's build tree from Debian's headers, the kernel's image and its modules. Adds `vmspawn` to PATH."""
    linux, modules = kernel
    headers = Path(f"/usr/src/linux-headers-{kernel_image.version_of(linux)}")
    if not headers.exists():
        pytest.skip(f"{headers.name} is not installed")
    tree = tmp_path / "linux"
    subprocess.run(["cp", "-rs", str(headers), str(tree)], check=True)
    (tree / "arch/x86/boot").mkdir(parents=True)
    shutil.copy(linux, tree / "arch/x86/boot/bzImage")
    (tree / "kernel").symlink_to(f"{modules}/kernel")
    (tmp_path / "bin").mkdir()
    make_script(tmp_path / "bin/vmspawn", f'exec {" ".join(VMSPAWN)} "$@"')
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.setenv("KDIR", str(tree))
    return tree


@pytest.mark.soak
@needs_virtiofsd
def test_the_example_of_the_docs_works(build_tree: Path) -> None:
    done = run_example("kernel.md", "kernel", build_tree, {})
    version = kernel_image.version_of(str(build_tree / "arch/x86/boot/bzImage"))
    assert (done.returncode, done.stdout) == (0, f"{version}\n{version}\n{build_tree}\n"), done.stderr


@pytest.mark.soak
@needs_virtiofsd
def test_the_module_of_the_docs_is_built_and_tested(build_tree: Path, tmp_path: Path) -> None:
    for program in ("gcc", "make"):
        if not shutil.which(program):
            pytest.skip(f"{program} is not installed")
    folder = tmp_path / "module"
    folder.mkdir()
    text = (Path(__file__).parents[2] / "docs/kernel.md").read_text()
    for name, content in re.findall(r"<!-- file: (\S+) -->\n```\w+\n(.*?)```", text, re.DOTALL):
        (folder / name).write_text(content)
    done = run_example("kernel.md", "module", folder, {})
    assert (done.returncode, done.stdout) == (0, "1..2\nok 1 wrong answer\nok 2 right answer\n"), done.stderr
