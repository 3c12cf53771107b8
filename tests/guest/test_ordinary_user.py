# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests the ways to reach a guest as an unprivileged user, when root runs the tests.

The user is `nobody`, with a separate home and a separate runtime directory.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.commands import DEADLINE
from tests.guest.test_own_kernel import has_virtiofsd
from tests.guest.test_ssh import SERVER, START
from vmspawn.guest import builtin
from vmspawn.guest.build import build
from vmspawn.helpers import virtiofsd

pytestmark = [
    pytest.mark.soak,
    pytest.mark.timeout(600),
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user"),
]

NOBODY = 65534

#: Seconds under emulation on a busy host.
TIMEOUT = 4 * DEADLINE


class User:
    """Runs commands of this checkout as the unprivileged user."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.runtime = home / "run"
        names = ("PATH", "LANG", "PYTHONPATH")
        self.environment = {
            **{name: os.environ[name] for name in names if name in os.environ},
            "HOME": str(home),
            "XDG_RUNTIME_DIR": str(self.runtime),
        }

    def start(self, *command: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            command,
            user=NOBODY,
            group=NOBODY,
            extra_groups=[],
            cwd=self.home,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *command: str) -> str:
        """Run a command, which must succeed, and return its output."""
        with self.start(*command) as process:
            try:
                output, _ = process.communicate(timeout=TIMEOUT)
            finally:
                process.kill()
        assert process.returncode == 0, output
        return output

    def vmctl(self, *arguments: str) -> str:
        return self.run(sys.executable, "-m", "vmspawn.cli.ctl", *arguments)

    @contextmanager
    def machine(self, *options: str) -> Iterator[None]:
        """Start a machine named `mine`. On exit, end it, and check that it leaves nothing in the runtime directory."""
        command = [sys.executable, "-m", "vmspawn.cli.spawn", "-M", "mine", "--guest=builtin", "--console=headless"]
        # If a test fails, QEMU ends with its manager.
        with self.start(*command, "--die-with-parent", *options) as process:
            try:
                self.vmctl("wait", "mine", "--for=agent", f"--timeout={TIMEOUT:g}")
                yield
                self.vmctl("terminate", "mine")
                output, _ = process.communicate(timeout=TIMEOUT)
            finally:
                process.kill()
        assert process.returncode == 0, output
        assert os.listdir(self.runtime / "vmspawn") == []


@pytest.fixture
def user() -> Iterator[User]:
    guest = Path((builtin.find() or build()).kernel).parent
    # pytest's own directories are closed to other users.
    with tempfile.TemporaryDirectory(prefix="vmspawn-user-") as folder:
        home = Path(folder)
        cache = home / ".cache/vmspawn/guest"
        shutil.copytree(guest, cache / guest.name)
        (home / "run").mkdir(mode=0o700)
        for path in (home, *home.rglob("*")):
            os.chown(path, NOBODY, NOBODY)
        found = User(home)
        with found.start(sys.executable, "-c", "import vmspawn") as process:
            if process.wait(DEADLINE):
                pytest.skip("another user cannot read this checkout, or its Python")
        yield found


def port_of(user: User) -> int:
    (forward,) = json.loads(user.vmctl("list-forwards", "mine", "--json=short"))
    return int(forward["port"])


def test_commands_copies_and_forwards_work_without_privileges(qemu: str, user: User) -> None:
    (user.home / "file").write_bytes(os.urandom(100_000))
    with user.machine(f"--qemu={qemu}", "--forward=0:80"):
        assert user.vmctl("exec", "mine", "id", "-u") == "0\n"
        user.vmctl("copy", "file", "mine:/tmp/page")
        user.vmctl("copy", "mine:/tmp/page", "back")
        user.vmctl("exec", "mine", "httpd", "-h", "/tmp")
        user.vmctl("wait", "mine", "--for=port=80")
        with urllib.request.urlopen(f"http://127.0.0.1:{port_of(user)}/page", timeout=DEADLINE) as page:
            assert page.read() == (user.home / "file").read_bytes() == (user.home / "back").read_bytes()
        assert (user.home / "back").stat().st_uid == NOBODY


def test_ssh_works_without_privileges(qemu: str, user: User) -> None:
    """The guest's root has another home directory, because virtiofsd cannot read /root with the user's rights."""
    if not (has_virtiofsd() and virtiofsd.find().is_rust):
        pytest.skip("the virtiofsd that is installed runs only as root")
    if not shutil.which(SERVER, path=f"{os.environ['PATH']}:/usr/sbin"):
        pytest.skip(f"{SERVER} is not installed")
    with user.machine(f"--qemu={qemu}", "--directory=/", "--pass-ssh-key=yes"):
        user.vmctl("exec", "mine", "sh", "-ec", START)
        user.vmctl("wait", "mine", "--for=ssh")
        (user.home / "config").write_text(user.vmctl("ssh-config", "mine"))
        assert user.vmctl("ssh", "mine", "pwd").endswith("/root\n")
        assert user.run("ssh", "-F", "config", "vmspawn/mine", "cat /proc/sys/kernel/ostype") == "Linux\n"
