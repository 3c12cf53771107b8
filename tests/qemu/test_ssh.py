# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests the SSH key and the cloud-init seed of a machine whose guest never boots: files, vmctl, adoption, removal."""

import base64
import json
import os
import re
import shutil
import signal
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.commands import VMCTL, Spawned, background, idle, one_line, qemu_pid, spawned, vmctl, vmspawn
from tests.conftest import make_raw
from tests.machines import fresh_name, is_gone
from tests.qemu.qmp_fixtures import wait_until
from tests.survivors import survivor

pytestmark = pytest.mark.skipif(not shutil.which("ssh-keygen"), reason="ssh-keygen is not installed")


def options(qemu: str, folder: Path) -> tuple[str, ...]:
    image = make_raw(folder / "boot", 1 << 20)
    return (f"--qemu={qemu}", f"--image={image}", "--ram=64M", "--console=headless", "--pass-ssh-key=yes")


@pytest.fixture(scope="module")
def machine(qemu: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Spawned]:
    with spawned(*options(qemu, tmp_path_factory.mktemp("image"))) as running:
        running.wait_for("is running")
        yield running


def access(name: str) -> dict[str, str]:
    done = vmctl("ssh-config", name, "--json=short")
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(done.stdout)
    return dict(found)


def passed_strings(name: str) -> bytes:
    """Return the SMBIOS strings that QEMU was started with."""
    pid = qemu_pid(name)
    arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    paths = [found[1].decode() for each in arguments if (found := re.fullmatch(rb"type=11,path=/proc/self(/.*)", each))]
    return b"\n".join(Path(f"/proc/{pid}{path}").read_bytes() for path in paths)


def test_the_key_is_the_machines_own(machine: Spawned) -> None:
    found = access(machine.name)
    key = Path(found["private_key"])
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert stat.S_IMODE(key.parent.stat().st_mode) == 0o700
    public = key.with_name("ssh-key.pub").read_bytes()
    derived = subprocess.run(["ssh-keygen", "-y", "-f", str(key)], capture_output=True, check=True).stdout
    assert derived.split()[:2] == public.split()[:2]
    assert public.split()[0] == b"ssh-ed25519"
    strings = dict(re.findall(rb"io.systemd.credential.binary:([\w.]+)=(\S+)", passed_strings(machine.name)))
    assert base64.b64decode(strings[b"ssh.authorized_keys.root"]) == public
    assert public.strip() in base64.b64decode(strings[b"tmpfiles.extra"])


def test_the_configuration_names_the_forwarded_port(machine: Spawned) -> None:
    found = access(machine.name)
    (forward,) = json.loads(vmctl("list-forwards", machine.name, "--json=short").stdout)
    assert (forward["guestPort"], forward["address"], forward["port"]) == (22, found["address"], found["port"])
    text = vmctl("ssh-config").stdout
    assert text == vmctl("ssh-config", machine.name).stdout
    assert text.startswith(f"Host vmspawn/{machine.name} vmspawn-{machine.name}\n")


def test_vmctl_becomes_ssh(machine: Spawned) -> None:
    """The guest never answers, so ssh waits. Words after the name of the machine are not options of vmctl."""
    command = ["ls", "-l", "--", "--timeout=1"]
    with background([*VMCTL, "ssh", "-t", f"me@{machine.name}", *command], stderr=subprocess.DEVNULL) as process:
        folder = Path(f"/proc/{process.pid}")

        def is_ssh() -> bool:
            assert process.poll() is None
            return (folder / "cmdline").read_text().startswith("ssh\0")

        # The kernel sets the command line a moment after the name.
        wait_until(is_ssh, "the execution of ssh")
        assert (folder / "comm").read_text() == "ssh\n"
        words = (folder / "cmdline").read_text().split("\0")[:-1]
        ignored = int(re.findall(r"SigIgn:\s*(\w+)", (folder / "status").read_text())[0], 16)
    assert words[1] == "-t"
    assert 'User="me"' in words
    assert words[-6:] == [f"vmspawn/{machine.name}", "--", *command]
    # Python ignores this signal. vmctl must undo that, because ssh does not.
    assert not ignored >> (signal.SIGXFSZ - 1) & 1


def refusal(*arguments: str) -> str:
    done = vmctl("ssh", *arguments)
    assert done.returncode == 125
    return one_line(done, "vmctl")


def test_failures_are_one_line(machine: Spawned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "there is no machine named" in refusal(fresh_name())
    assert "invalid machine name" in refusal("root@")
    assert "the name of the user is empty" in refusal(f"@{machine.name}")
    assert "unknown option" in refusal("--unknown", machine.name)
    port = str(access(machine.name)["port"])
    assert vmctl("forward", machine.name, "--remove", port).returncode == 0
    assert "no port of this host is forwarded" in refusal(machine.name)
    assert vmctl("ssh-config").stdout == ""
    assert vmctl("ssh-config", machine.name).returncode == 1
    assert vmctl("forward", machine.name, f"{port}:22").returncode == 0
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "ssh is not installed" in refusal(machine.name)


def test_a_machine_without_a_key_is_reported(qemu: str, tmp_path: Path) -> None:
    with idle(qemu, tmp_path) as running:
        assert "has no SSH key" in refusal(running.name)
        done = vmctl("ssh-config", running.name)
    assert done.returncode == 1
    assert "--pass-ssh-key=yes" in done.stderr


def test_the_key_survives_the_manager_and_is_removed_with_the_machine(qemu: str, tmp_path: Path) -> None:
    with survivor(fresh_name(), *options(qemu, tmp_path)) as machine:
        before = access(machine.name)
        Path(before["known_hosts"]).write_text("kept\n")
        machine.kill_manager()
        machine.adopt()
        assert access(machine.name) == before
        assert Path(before["known_hosts"]).read_text() == "kept\n"
    assert is_gone(machine.name)


def test_the_backup_of_the_host_keys_is_removed_with_the_machine(qemu: str, tmp_path: Path) -> None:
    """ssh-keygen -R keeps a copy of the list of host keys that it changes."""
    with spawned(*options(qemu, tmp_path)) as running:
        running.wait_for("is running")
        known = Path(access(running.name)["known_hosts"])
        known.write_text(f"vmspawn/{running.name} {known.with_name('ssh-key.pub').read_text()}")
        forget = ["ssh-keygen", "-R", f"vmspawn/{running.name}", "-f", str(known)]
        subprocess.run(forget, check=True, capture_output=True)
        assert known.with_name("ssh-known-hosts.old").exists()
    assert is_gone(running.name)


def test_a_key_that_cannot_be_made_is_reported(qemu: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = fresh_name()
    done = vmspawn("-M", name, *options(qemu, tmp_path), "--ssh-key-type=nonsense")
    assert done.returncode == 1
    assert "cannot make a key with --ssh-key-type=nonsense: unknown key type" in one_line(done, "vmspawn")
    assert is_gone(name)
    monkeypatch.setenv("PATH", str(tmp_path))
    done = vmspawn("-M", name, *options(shutil.which(qemu, path=os.defpath) or qemu, tmp_path))
    assert done.returncode == 1
    assert "--pass-ssh-key= needs ssh-keygen, which is not installed" in one_line(done, "vmspawn")
    assert is_gone(name)


def test_a_seed_for_cloud_init_is_removed_with_the_machine(qemu: str, tmp_path: Path) -> None:
    pytest.importorskip("pycdlib")
    (tmp_path / "user-data").write_text("#cloud-config\n")
    image = make_raw(tmp_path / "boot", 1 << 20)
    wishes = (f"--qemu={qemu}", f"--image={image}", "--ram=64M", "--console=headless")
    with spawned(*wishes, f"--cloud-init={tmp_path}/user-data") as running:
        running.wait_for("is running")
        disks = json.loads(vmctl("list-disks", running.name, "--json=short").stdout)
        seed = next(each for each in disks if each["name"] == "cidata")
        assert (seed["readOnly"], seed["bus"]) == (True, "virtio-blk")
        public = Path(access(running.name)["private_key"]).with_name("ssh-key.pub").read_text().strip()
        assert public in Path(seed["path"]).read_bytes().decode(errors="replace")
    assert is_gone(running.name)
    name = fresh_name()
    done = vmspawn("-M", name, *wishes, f"--cloud-init={tmp_path}/missing")
    assert done.returncode == 1
    assert "cannot use --cloud-init=" in one_line(done, "vmspawn")
    assert is_gone(name)
