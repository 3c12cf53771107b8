# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests Debian's cloud images: cloud-init finds the seed, and OpenSSH's server accepts the machine's key."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests import debian
from tests.commands import Spawned, spawned, vmctl

pytestmark = [pytest.mark.soak, pytest.mark.timeout(2400)]

#: Seconds under emulation on a busy host.
BOOT_TIMEOUT = 900.0
COMMAND_TIMEOUT = 180.0

#: Unlike a cloud image, the tree has no locales.
USER_DATA = """\
#cloud-config
locale: false
write_files: [{path: /etc/made, content: by user data}]
"""


@contextmanager
def booted(qemu: str, suite: str, image: Path, *options: str) -> Iterator[Spawned]:
    """Boot the image of a suite, and wait until its SSH server answers. The image keeps the guest's changes."""
    linux, initrd = debian.kernel(suite)
    common = (f"--qemu={qemu}", f"--image={image}", f"--linux={linux}", f"--initrd={initrd}", "--ram=1G")
    arguments = (f"root=LABEL={debian.LABEL}", "rw")
    with spawned(*common, "--console=headless", *options, *arguments, name="cloud") as running:
        running.wait_for("is running")
        done = vmctl("wait", "cloud", "--for=ssh", f"--timeout={BOOT_TIMEOUT:g}", timeout=BOOT_TIMEOUT + 60)
        assert done.returncode == 0, done.stderr
        yield running


def run(machine: str, *command: str) -> str:
    done = vmctl("ssh", machine, *command, timeout=COMMAND_TIMEOUT)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("suite", [debian.SUITE, debian.OLDER])
def test_each_start_of_a_cloud_image_can_be_logged_into(qemu: str, suite: str, tmp_path: Path) -> None:
    """cloud-init configures the image only once. Each start adds a key to root's keys."""
    debian.need()
    image = debian.root(tmp_path / "cloud", debian.cloud_tree(suite))
    (tmp_path / "user-data").write_text(USER_DATA)
    option = f"--cloud-init={tmp_path}/user-data"
    with booted(qemu, suite, image, option):
        # The server may start before cloud-init has made the user and allowed root.
        assert "status: done" in run("cloud", "cloud-init status --wait || true")
        assert run("cloud", "hostname") == "cloud"
        assert run("cloud", "cat /etc/made") == "by user data"
        assert run("debian@cloud", "id -un") == "debian"
        assert run("cloud", "rm /etc/made; sync; grep -c vmspawn/cloud .ssh/authorized_keys")
        first = run("cloud", "cat .ssh/authorized_keys")
    with booted(qemu, suite, image, option):
        assert run("cloud", "cloud-init status --wait >/dev/null; ls /etc/made 2>/dev/null; true") == ""
        keys = run("cloud", "cat .ssh/authorized_keys")
        assert set(first.splitlines()) < set(keys.splitlines())
