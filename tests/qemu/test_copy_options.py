# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests the options in which a copy differs from its source, by the commands, the library and Varlink."""

import shlex
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tests.callers import caller, in_thread
from tests.commands import VMCTL, background, one_line, vmctl
from tests.commands import vmspawn as run_vmspawn
from tests.copies import inner, snapshot_paths
from tests.machines import Machine, fresh_name, idle_machine, is_gone, wait_until_nothing_left
from vmspawn import Snapshot, connect
from vmspawn.errors import PortInUse, StartError, UsageError
from vmspawn.images import snapshot_files
from vmspawn.network.forward import Forward
from vmspawn.snapshots.directory import CURRENT

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def source(qemu: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[tuple[Machine, Snapshot]]:
    """Run a machine with a forward. Yields the machine and its snapshot."""
    folder = tmp_path_factory.mktemp("source")
    async with idle_machine(qemu, folder, control=True, network_user=True, forwards=["0:22"]) as machine:
        snapshot = await machine.snapshot("s")
        yield machine, snapshot
        await snapshot.remove()


Source = tuple[Machine, Snapshot]


async def test_a_copy_has_its_own_forwards_and_log(source: Source, tmp_path: Path) -> None:
    log = tmp_path / "log"
    async with source[1].fork(forwards=[80], console="read-only", console_log=log) as copy:
        assert [each.guest_port for each in await copy.forwards()] == [80]
        assert inner(copy).config.console == "read-only"
        assert log.exists()
    async with source[1].fork() as copy:
        assert await copy.forwards() == []


async def test_a_port_that_is_taken_ends_the_copy(source: Source) -> None:
    name = fresh_name()
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(PortInUse, match=r"process \d+"):
        await source[1].fork(name, forwards=[Forward(80, taken.getsockname()[1])]).__aenter__()
    assert is_gone(name)


async def test_options_of_the_source_alone_are_refused(source: Source, qemu: str, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'cpus'"):
        source[1].fork(cpus=2)  # type: ignore[call-arg]
    with pytest.raises(UsageError, match="does not work with console='native'"):
        await source[1].fork(console="native").__aenter__()  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="saved without one") as refused:
        await source[1].fork(console="gui").__aenter__()
    assert refused.value.hint == "start the source with console='gui'"
    async with idle_machine(qemu, tmp_path) as machine:
        with pytest.raises(UsageError, match="forwards= needs a network card"):
            await machine.fork(forwards=[80]).__aenter__()
        # The snapshot for the copy is removed.
        assert snapshots_of(machine) == []


async def test_the_fork_of_a_machine_leaves_no_snapshot(source: Source) -> None:
    machine, snapshot = source
    async with connect(machine.name) as connected:
        for each in (machine, connected):
            async with each.fork(forwards=["0:81"]) as copy:
                assert [one.guest_port for one in await copy.forwards()] == [81]
                assert len(snapshots_of(machine)) == 2
            assert snapshots_of(machine) == [snapshot.name]
        with pytest.raises(StartError, match="already running"):
            await connected.fork(machine.name).__aenter__()
        assert snapshots_of(machine) == [snapshot.name]


def snapshots_of(machine: Machine) -> list[str]:
    """Return the names of a machine's snapshots, without its newest disks."""
    names = [name for name in snapshot_files.names() if name.startswith(f"{machine.name}@")]
    return [name for name in names if not name.endswith(f"@{CURRENT}")]


async def test_vmctl_starts_a_copy_with_options(source: Source, tmp_path: Path) -> None:
    name, log = fresh_name(), tmp_path / "log"
    options = ("--forward=0:80", "--forward=127.0.0.2:0:53/udp", f"--log={log}", "--console=headless")
    done = await in_thread(vmctl, "fork", source[1].name, name, *options)
    assert done.returncode == 0, done.stderr
    try:
        async with connect(name) as copy:
            lines = [f"{name}: {each.host} to port {each.guest_port}" for each in await copy.forwards()]
        assert [line.removesuffix(" (udp)") for line in done.stdout.splitlines()[1:3]] == lines
        assert log.exists()
    finally:
        await in_thread(vmctl, "terminate", name, "--wait")


async def test_vmctl_refuses_options_that_a_copy_cannot_have(source: Source) -> None:
    machine = source[0].name
    done = await in_thread(vmctl, "fork", source[1].name, "--forward=80")
    assert one_line(done, "vmctl") == "vmctl: --forward=80: the syntax is not understood"
    # A name without a snapshot saves the machine first.
    done = await in_thread(vmctl, "fork", machine, "--console=interactive")
    assert one_line(done, "vmctl").startswith("vmctl: --console=interactive does not work for a copy in the background")
    done = await in_thread(vmctl, "fork", machine, "--console=gui")
    assert one_line(done, "vmctl").startswith("vmctl: --console=gui needs a display device")
    assert snapshots_of(source[0]) == [source[1].name]


async def test_vmctl_refuses_a_name_that_is_in_use(source: Source) -> None:
    before, machine = snapshot_paths(), source[0].name
    done = await in_thread(vmctl, "fork", machine, machine)
    assert done.stderr.splitlines() == [
        f"vmctl: a machine named {machine} is already running",
        "       choose another name with NEW",
    ]
    assert snapshot_paths() == before


async def test_vmspawn_refuses_a_copy_with_a_taken_port_or_a_native_console(source: Source) -> None:
    name = fresh_name()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        forward = f"--forward={taken.getsockname()[1]}:80"
        done = await in_thread(run_vmspawn, f"--fork={source[1].name}", "-M", name, forward)
    assert "has the port" in one_line(done, "vmspawn")
    done = await in_thread(run_vmspawn, f"--fork={source[1].name}", "-M", name, "--console=native")
    assert one_line(done, "vmspawn") == "vmspawn: a copy does not work with --console=native"
    assert is_gone(name)


Command = Callable[[str, str], list[str]]

CALL = """
import sys
from vmspawn.control.client import Client
with Client(sys.argv[1], timeout=60) as client:
    parameters = {"snapshot": "s", "names": [sys.argv[2]], "forwards": [{"guestPort": 80}], "dieWithCaller": True}
    print(client.call("io.vmspawn.Machine.Fork", parameters))
    sys.stdin.read()
"""


def by_vmctl(machine: str, name: str) -> list[str]:
    command = shlex.join([*VMCTL, "fork", f"{machine}@s", name, "--die-with-parent"])
    return ["sh", "-c", f"{command}; read forever"]


def by_varlink(machine: str, name: str) -> list[str]:
    return [sys.executable, "-c", CALL, machine, name]


@pytest.mark.parametrize("command", [by_vmctl, by_varlink], ids=["parent of vmctl", "caller"])
async def test_a_copy_ends_with_the_process_that_wanted_it(source: Source, command: Command) -> None:
    machine, name = source[0].name, fresh_name()
    with background(command(machine, name), stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert name in (await in_thread(process.stdout.readline)).decode()
        assert not is_gone(name)
        process.kill()
        await in_thread(wait_until_nothing_left, name)


async def test_varlink_refuses_options_that_a_copy_cannot_have(source: Source) -> None:
    def ask() -> list[str]:
        wanted: list[dict[str, Any]] = [{"log": "relative"}, {"forwards": [{"guestPort": 0}]}, {"console": "native"}]
        with caller(source[0]) as client:
            replies = [client.call("io.vmspawn.Machine.Fork", snapshot="s", **each) for each in wanted]
        return [each["parameters"].get("parameter") or each["parameters"]["message"] for each in replies]

    log, forward, console = await in_thread(ask)
    assert (log, forward) == ("log", "guestPort")
    assert console.startswith("console='native' does not work for a copy in the background")
