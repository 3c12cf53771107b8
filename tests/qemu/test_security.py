# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests QEMU's sandbox and environment, and the access to the manager (docs/security.md)."""

import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.commands import idle, qemu_pid, sharing
from tests.conftest import make_raw
from tests.machines import Machine, idle_machine, is_gone, links_of, process_is_gone
from tests.qemu import qmp_fixtures
from vmspawn import Disk
from vmspawn.errors import NotConnected, QmpError, StartError
from vmspawn.host import runtime, spawn


@pytest_asyncio.fixture
async def machine(qemu: str, tmp_path: Path) -> AsyncIterator[Machine]:
    async with idle_machine(qemu, tmp_path) as running:
        yield running


def statuses(pid: int) -> list[dict[str, str]]:
    """Return the status of each thread of a process (proc(5))."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    lines = [(task / "status").read_text().splitlines() for task in tasks]
    return [dict(line.split(":\t", 1) for line in found if ":\t" in line) for found in lines]


async def test_every_thread_of_qemu_is_filtered(machine: Machine, tmp_path: Path) -> None:
    await machine.attach(Disk(str(make_raw(tmp_path / "disk")), bus="virtio-scsi", thread=True))
    threads = statuses(machine.pid)
    assert len(threads) > 2
    # 2 is SECCOMP_MODE_FILTER.
    assert {thread["Seccomp"] for thread in threads} == {"2"}
    assert {thread["NoNewPrivs"] for thread in threads} == {"1"}
    told = command_line(machine.pid)
    denied = ("obsolete", "elevateprivileges", "spawn", "resourcecontrol")
    assert told[told.index("-sandbox") + 1] == ",".join(("on", *(f"{each}=deny" for each in denied)))


def command_line(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_text().split("\0")


async def test_qemu_starts_no_program(machine: Machine, tmp_path: Path) -> None:
    """QEMU dies or refuses if a monitor requests a program, and no program runs."""
    witness = tmp_path / "was-run"
    try:
        await machine.monitor.execute("migrate", {"uri": f"exec:touch {witness}"})
        with machine.events() as events:
            async for _ in events:
                pass  # until QEMU has died
    except (NotConnected, QmpError):
        pass
    assert not witness.exists()


async def test_the_user_can_turn_the_sandbox_off(qemu: str, tmp_path: Path) -> None:
    async with idle_machine(qemu, tmp_path, qemu_arguments=("-sandbox", "off")) as machine:
        assert {thread["Seccomp"] for thread in statuses(machine.pid)} == {"0"}


async def test_qemu_gets_no_secrets_of_the_environment(
    qemu: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SECRET_TOKEN", "LD_PRELOAD_NOT", "QEMU_AUDIO_DRV", "SSH_AUTH_SOCK"):
        monkeypatch.setenv(name, "secret")
    async with idle_machine(qemu, tmp_path) as machine:
        environment = environment_of(machine.pid)
    assert "secret" not in environment.values()
    # A shell script that starts QEMU adds the shell's own variables.
    assert set(environment) - {"PWD", "OLDPWD", "SHLVL", "_", "LD_LIBRARY_PATH"} <= {
        *spawn.ENVIRONMENT,
        *spawn.OVERRIDES,
    }


def environment_of(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/environ").read_text().split("\0")
    return dict(line.split("=", 1) for line in lines if line)


async def test_qemu_opens_no_image_by_its_path(machine: Machine, tmp_path: Path) -> None:
    assert machine.config.image
    assert not [word for word in command_line(machine.pid) if machine.config.image in word]
    disk = make_raw(tmp_path / "disk")
    await machine.attach(Disk(str(disk), bus="virtio-scsi"))
    nodes = await machine.monitor.execute("query-named-block-nodes", {"flat": True})
    assert len(nodes) >= 4
    for path in (str(disk), machine.config.image):
        assert path not in str(nodes)


async def test_qemu_inherits_no_descriptor_of_the_manager(qemu: str, tmp_path: Path) -> None:
    """This includes descriptors that vmspawn's parent left open for children."""
    ours = str(make_raw(tmp_path / "ours", 4096))
    fd = os.open(ours, os.O_RDONLY)
    os.set_inheritable(fd, True)
    async with idle_machine(qemu, tmp_path) as machine:
        links = links_of(machine.pid)
    os.close(fd)
    assert ours not in links
    assert not [link for link in links if link.endswith(machine.name)]


def test_sockets_and_files_are_for_their_owner_alone(qemu: str, tmp_path: Path) -> None:
    with idle(qemu, tmp_path) as running:
        folder = Path(runtime.runtime_root()) / running.name
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        for file in folder.iterdir():
            assert stat.S_IMODE(file.stat().st_mode) == 0o600, file


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
def test_another_user_is_not_served(qemu: str, tmp_path: Path) -> None:
    """This includes a user who can reach the socket."""
    with idle(qemu, tmp_path) as running:
        folder = Path(runtime.runtime_root()) / running.name
        for path in (folder.parent, folder):
            path.chmod(0o755)
        for name in (runtime.CONTROL, runtime.CONSOLE):
            (folder / name).chmod(0o666)
            assert stranger_hears(folder / name) == b""
        folder.parent.chmod(0o700)
        assert qemu_pid(running.name)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
def test_another_user_gets_no_session_of_a_shared_monitor(qemu: str) -> None:
    with tempfile.TemporaryDirectory() as folder, qmp_fixtures.Machine(qemu, 1) as foreign:
        Path(folder).chmod(0o755)
        listen = Path(folder, "shared.sock")
        with sharing(str(foreign.path(0)), str(listen)):
            listen.chmod(0o666)
            assert stranger_hears(listen) == b""
            assert hears(listen).startswith(b'{"QMP":')


#: Connects, as another user if there is a second argument, and prints the first data.
HEAR = """
import os, socket, sys
for number in map(int, sys.argv[2:]):
    os.setgroups([])
    os.setgid(number)
    os.setuid(number)
client = socket.socket(socket.AF_UNIX)
client.settimeout(20)
client.connect(sys.argv[1])
try:
    client.sendall(b'{"method":"org.varlink.service.GetInfo"}\\0')
    sys.stdout.write(client.recv(100).decode())
except ConnectionError:
    pass
"""


def hears(path: Path, *user: str) -> bytes:
    """Return the data that a process, of another user if one is given, reads from a socket."""
    command = [sys.executable, "-I", "-c", HEAR, str(path), *user]
    return subprocess.run(command, timeout=60, check=True, stdout=subprocess.PIPE).stdout


def stranger_hears(path: Path) -> bytes:
    """Return the data that the user `nobody` reads from a socket."""
    return hears(path, "65534")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can change the owner of a directory")
@pytest.mark.parametrize("what", ["foreign", "open", "link", "file"])
def test_a_runtime_directory_that_others_could_change_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    root = tmp_path / "root"
    match what:
        case "foreign":
            root.mkdir(mode=0o700)
            os.chown(root, 65534, 65534)
        case "open":
            root.mkdir()
            root.chmod(0o777)
        case "link":
            (tmp_path / "elsewhere").mkdir(mode=0o700)
            root.symlink_to(tmp_path / "elsewhere")
        case "file":
            root.touch()
    monkeypatch.setenv("VMSPAWN_RUNTIME_DIR", str(root))
    with pytest.raises(StartError, match="runtime directory") as caught:
        runtime.MachineDirectory.create("name")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "elsewhere" / "name").exists()


async def test_a_machine_that_ends_leaves_neither_process_nor_directory(qemu: str, tmp_path: Path) -> None:
    async with idle_machine(qemu, tmp_path) as machine:
        pid = machine.pid
    assert process_is_gone(pid)
    assert is_gone(machine.name)
