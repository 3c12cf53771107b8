# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests predicting whether a kernel can mount a directory as its root, from its initrd and files beside it."""

import gzip
import io
import lzma
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vmspawn.guest.initramfs import Initramfs
from vmspawn.images.kernel_image import version_of
from vmspawn.images.virtiofs_support import why_not

VERSION = "6.1.0-37-amd64"


def make_kernel(folder: Path, *, version: str = "") -> Path:
    """Make a kernel. With `version`, its header has that version, as in x86's boot protocol."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"vmlinuz-{VERSION}"
    header = bytearray(0x400)
    header[0x202:0x206] = b"HdrS"
    if version:
        header[0x20E:0x210] = (0x100).to_bytes(2, "little")
        text = f"{version} (builder@host) #1 SMP".encode()
        header[0x300 : 0x300 + len(text)] = text
    path.write_bytes(bytes(header))
    return path


def archive(*names: str) -> bytes:
    """Return an initramfs with these files, made by the writer of the built-in guest."""
    output = io.BytesIO()
    made = Initramfs(output)
    for name in names:
        made.add_file(name, b"content" * 3)
    made.close()
    return output.getvalue()


PLAIN = archive("init", "lib/modules/6/fs/ext4.ko")
WITH = archive("init", "lib/modules/6/fs/fuse/virtiofs.ko.xz", "etc/passwd")


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ("CONFIG_VIRTIO_FS=y", ""),
        ("CONFIG_VIRTIO_FS=m", "no initrd"),
        ("# CONFIG_VIRTIO_FS is not set", "built without"),
    ],
)
def test_the_configuration_beside_the_kernel_decides(tmp_path: Path, state: str, said: str) -> None:
    linux = make_kernel(tmp_path / "boot")
    (tmp_path / "boot" / f"config-{VERSION}").write_text(f"CONFIG_FUSE_FS=y\n{state}\n")
    found = why_not(str(tmp_path), str(linux), [])
    assert said in found
    assert bool(said) == bool(found)


def test_the_configuration_of_a_build_tree_decides(tmp_path: Path) -> None:
    linux = make_kernel(tmp_path / "arch/x86/boot")
    (tmp_path / ".config").write_text("CONFIG_FUSE_FS=y\n")
    assert "built without virtiofs" in why_not("/", str(linux), [])


@pytest.mark.parametrize(
    ("built_in", "modules", "said"),
    [
        ("kernel/fs/fuse/virtiofs.ko\n", "", ""),
        ("kernel/fs/ext4/ext4.ko\n", "kernel/fs/fuse/virtiofs.ko.xz: kernel/fs/fuse/fuse.ko.xz\n", "no initrd"),
        ("kernel/fs/ext4/ext4.ko\n", "kernel/fs/fuse/fuse.ko:\n", "built without"),
        ("kernel/fs/ext4/ext4.ko\n", "", ""),
    ],
)
def test_the_lists_of_modules_in_the_directory_decide(tmp_path: Path, built_in: str, modules: str, said: str) -> None:
    """The version is read from the kernel's header, not from the file's name."""
    linux = make_kernel(tmp_path, version="5.4-test")
    assert version_of(str(linux)) == "5.4-test"
    folder = tmp_path / "lib/modules/5.4-test"
    folder.mkdir(parents=True)
    (folder / "modules.builtin").write_text(built_in)
    (folder / "modules.dep").write_text(modules)
    found = why_not(str(tmp_path), str(linux), [])
    assert said in found
    assert bool(said) == bool(found)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (WITH, ""),
        (PLAIN, "lacks the module"),
        (gzip.compress(WITH), ""),
        (gzip.compress(PLAIN), "lacks the module"),
        (PLAIN + bytes(512) + gzip.compress(WITH), ""),
        (PLAIN + bytes(512) + PLAIN, "lacks the module"),
        (PLAIN + lzma.compress(WITH), ""),
        (lzma.compress(PLAIN), ""),
        (PLAIN[:-300], ""),
        (gzip.compress(PLAIN)[:-20], ""),
        (gzip.compress(PLAIN)[:40] + b"nonsense" * 9, ""),
        (b"", "lacks the module"),
    ],
)
def test_an_initrd_is_searched_for_the_module_if_it_can_be_read(tmp_path: Path, content: bytes, said: str) -> None:
    linux = make_kernel(tmp_path)
    (tmp_path / "initrd").write_bytes(content)
    found = why_not(str(tmp_path), str(linux), [str(tmp_path / "initrd")])
    assert said in found
    assert bool(said) == bool(found)


@pytest.mark.skipif(not shutil.which("cpio"), reason="cpio is not installed")
def test_an_archive_of_cpio_is_read(tmp_path: Path) -> None:
    (tmp_path / "virtiofs.ko").write_bytes(b"1")
    linux = make_kernel(tmp_path)
    for names, said in (("virtiofs.ko", ""), (linux.name, "lacks the module")):
        made = subprocess.run(
            ["cpio", "-o", "-H", "newc", "--quiet"], input=names.encode(), capture_output=True, check=True, cwd=tmp_path
        )
        (tmp_path / "initrd").write_bytes(made.stdout)
        assert said in why_not(str(tmp_path), str(linux), [str(tmp_path / "initrd")])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=400), st.sampled_from([lambda data: data, gzip.compress]))
def test_no_content_of_an_initrd_is_an_error(tmp_path: Path, rest: bytes, pack: Callable[[bytes], bytes]) -> None:
    linux = make_kernel(tmp_path)
    (tmp_path / "initrd").write_bytes(pack(b"070701" + rest))
    assert isinstance(why_not(str(tmp_path), str(linux), [str(tmp_path / "initrd")]), str)
