# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests logins to an SSH server of the host's userland, with the key that the machine passes to the guest."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.commands import DEADLINE, Spawned, run_example, spawned, vmctl
from tests.guest.test_own_kernel import needs_virtiofsd

#: The SSH server. The package dropbear-bin has no service that would start on this host.
SERVER = "dropbear"

pytestmark = [
    needs_virtiofsd,
    pytest.mark.skipif(not shutil.which("ssh"), reason="ssh is not installed"),
    pytest.mark.skipif(
        not shutil.which(SERVER, path=f"{os.environ['PATH']}:/usr/sbin"), reason=f"{SERVER} is not installed"
    ),
]

#: Starts the server in the guest, without the startup files of this host's root, which root's shell would read.
START = f"""
rm -f /root/.bashrc /root/.profile /root/.bash_profile
mkdir -p /etc/dropbear
{SERVER} -R
"""


@pytest.fixture(scope="module")
def machine(qemu: str) -> Iterator[Spawned]:
    options = ("--guest=builtin", f"--qemu={qemu}", "--directory=/", "--pass-ssh-key=yes", "--console=headless")
    with spawned(*options) as running:
        running.wait_for("is running")
        done = vmctl("exec", running.name, "sh", "-ec", START)
        assert done.returncode == 0, done.stderr
        assert vmctl("wait", running.name, "--for=ssh").returncode == 0
        yield running


@pytest.fixture(scope="module")
def config(machine: Spawned, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Write the output of `vmctl ssh-config` to a file, and return its path."""
    path = tmp_path_factory.mktemp("config") / "a config"
    path.write_text(vmctl("ssh-config", machine.name).stdout)
    return str(path)


def run(*command: str, data: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, input=data, capture_output=True, text=True, timeout=DEADLINE, check=False)


def test_ssh_runs_a_command_and_exits_with_its_status(machine: Spawned) -> None:
    done = vmctl("ssh", machine.name, "echo out; echo err >&2; exit 7")
    assert (done.returncode, done.stdout) == (7, "out\n")
    assert "err\n" in done.stderr
    assert vmctl("ssh", f"nobody@{machine.name}", "true").returncode == 255


def test_ssh_and_scp_work_with_the_configuration(machine: Spawned, config: str, tmp_path: Path) -> None:
    done = run("ssh", "-F", config, f"vmspawn/{machine.name}", "cat >/tmp/typed", data="typed\n")
    assert done.returncode == 0, done.stderr
    if not os.path.exists("/usr/lib/openssh/sftp-server"):
        pytest.skip("openssh-sftp-server is not installed")
    done = run("scp", "-F", config, f"vmspawn-{machine.name}:/tmp/typed", str(tmp_path / "copy"))
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "copy").read_text() == "typed\n"


@pytest.mark.soak
def test_rsync_works_with_the_configuration(machine: Spawned, config: str, tmp_path: Path) -> None:
    if not shutil.which("rsync"):
        pytest.skip("rsync is not installed")
    (tmp_path / "from").mkdir()
    (tmp_path / "from" / "a file").write_bytes(os.urandom(100_000))
    there = f"vmspawn-{machine.name}:/tmp/there"
    for source, target in ((f"{tmp_path}/from/", there), (f"{there}/", f"{tmp_path}/back")):
        done = run("rsync", "-a", "-e", f"ssh -F '{config}'", source, target)
        assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "back" / "a file").read_bytes() == (tmp_path / "from" / "a file").read_bytes()


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_ansible_works_with_the_configuration(machine: Spawned, config: str, tmp_path: Path) -> None:
    if not shutil.which("ansible-playbook"):
        pytest.skip("ansible-playbook is not installed")
    tasks = [
        {"raw": "exit 3", "register": "done", "failed_when": "done.rc != 3"},
        {"copy": {"content": "by ansible\n", "dest": "/tmp/made"}},
        {"command": "cat /tmp/made", "register": "found"},
        {"assert": {"that": "found.stdout == 'by ansible'"}},
    ]
    (tmp_path / "site.yml").write_text(json.dumps([{"hosts": "all", "gather_facts": False, "tasks": tasks}]))
    command = ["ansible-playbook", "-i", f"vmspawn-{machine.name},", f"--ssh-common-args=-F '{config}'", "site.yml"]
    # ControlMaster=no: ssh leaves no connection open after its end.
    environment = {**os.environ, "ANSIBLE_HOME": str(tmp_path / "home"), "ANSIBLE_SSH_ARGS": "-o ControlMaster=no"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=10 * DEADLINE, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ok=4" in done.stdout


def test_the_host_key_is_pinned(machine: Spawned) -> None:
    """Another key is refused while the machine runs."""
    (access,) = json.loads(vmctl("ssh-config", machine.name, "--json=short").stdout)
    known = Path(access["known_hosts"])
    before = known.read_text()
    other = known.with_name("ssh-key.pub").read_text().split()[:2]
    try:
        known.write_text(f"vmspawn/{machine.name} {' '.join(other)}\n")
        done = vmctl("ssh", machine.name, "true")
        assert done.returncode == 255
        assert "REMOTE HOST IDENTIFICATION HAS CHANGED" in done.stderr
    finally:
        known.write_text(before)


def test_the_example_of_the_docs_works(machine: Spawned, tmp_path: Path) -> None:
    """In the docs, the machine is called web."""
    if not os.path.exists("/usr/lib/openssh/sftp-server"):
        pytest.skip("openssh-sftp-server is not installed")
    done = run_example("ssh.md", "ssh", tmp_path, {"web": machine.name})
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "10.0.2.2\nLinux\n"
    assert (tmp_path / "ostype").read_text() == "Linux\n"
