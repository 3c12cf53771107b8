# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests forwards by the library, vmctl and Varlink, also after the manager died."""

import json
import socket
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

import vmspawn
from tests.callers import caller, in_thread, served_machine
from tests.commands import one_line, vmctl
from tests.commands import vmspawn as run_vmspawn
from tests.conftest import make_raw
from tests.machines import Machine, fresh_name, idle_machine, is_gone
from tests.survivors import survivor
from vmspawn.cli.spelling import as_option
from vmspawn.errors import NoSuchForward, NotSupported, PortInUse, SystemFailure
from vmspawn.network.forward import Forward


@pytest_asyncio.fixture
async def machine(qemu: str, tmp_path: Path) -> AsyncIterator[Machine]:
    async with served_machine(qemu, tmp_path, forwards=("0:22",)) as running:
        yield running


async def test_forwards_are_added_listed_and_removed(machine: Machine) -> None:
    (at_start,) = await machine.forwards()
    assert at_start._replace(port=0) == Forward(22)
    assert at_start.port
    added = await machine.forward("127.0.0.2:0:53/udp")
    assert added._replace(port=0) == Forward(53, 0, "127.0.0.2", "udp")
    async with vmspawn.connect(machine.name) as connected:
        assert set(await connected.forwards()) == {at_start, added}
        more = await connected.forward(80)
        assert set(await machine.forwards()) == {at_start, added, more}
        assert await connected.remove_forward(more) == more
        with pytest.raises(NoSuchForward, match="no forward from"):
            await connected.remove_forward(more)
        with pytest.raises(NoSuchForward):
            await connected.remove_forward(added._replace(guest_port=54))
    assert await machine.remove_forward(added) == added
    assert await machine.forwards() == [at_start]


async def test_the_error_about_a_taken_port_names_its_holder(machine: Machine) -> None:
    (at_start,) = await machine.forwards()
    taken = socket.create_server(("127.0.0.1", 0))
    with taken, pytest.raises(PortInUse, match=r"process \d+ \(.*\) has the port"):
        await machine.forward(Forward(80, taken.getsockname()[1]))
    with pytest.raises(PortInUse, match=f"machine {machine.name} has the port"):
        await machine.forward(Forward(80, at_start.port))
    with pytest.raises(SystemFailure, match="Cannot assign"):
        await machine.forward("192.0.2.1:0:80")
    assert await machine.forwards() == [at_start]


async def test_an_invalid_forward_is_refused_with_the_name_of_the_parameter(machine: Machine) -> None:
    def ask() -> list[str]:
        with caller(machine) as client:
            calls: list[dict[str, Any]] = [
                {"guestPort": 0},
                {"guestPort": 80, "port": 65536},
                {"guestPort": 80, "port": 0, "address": "127.0.0.1:1-:2\nquit"},
                {"guestPort": 80, "protocol": "sctp"},
            ]
            return [client.call("io.vmspawn.Machine.AddForward", **each)["parameters"]["parameter"] for each in calls]

    assert await in_thread(ask) == ["guestPort", "port", "address", "protocol"]


async def test_a_machine_without_a_network_refuses_forwards(qemu: str, tmp_path: Path) -> None:
    async with idle_machine(qemu, tmp_path) as running:
        assert await running.forwards() == []
        with pytest.raises(NotSupported, match="no user-mode network") as refused:
            await running.forward(22)
        assert refused.value.spelled(partial(as_option, "vmctl"))[1] == "start it with --network-user-mode"


def test_forwards_survive_the_manager(qemu: str, tmp_path: Path) -> None:
    image = make_raw(tmp_path / "boot", 1 << 20)
    options = (f"--qemu={qemu}", f"--image={image}", "--ram=64M", "--console=headless", "--forward=0:22")
    with survivor(fresh_name(), *options) as machine:
        done = vmctl("forward", machine.name, "0:80", "0.0.0.0:0:53/udp")
        assert done.returncode == 0, done.stderr
        assert [line.partition(" to ")[2] for line in done.stdout.splitlines()] == ["port 80", "port 53 (udp)"]
        before = vmctl("list-forwards", machine.name, "--json=short").stdout
        assert sorted(each["guestPort"] for each in json.loads(before)) == [22, 53, 80]
        machine.kill_manager()
        machine.adopt()
        assert vmctl("list-forwards", machine.name, "--json=short").stdout == before
        assert "to port 53 (udp)" in vmctl("status", machine.name).stdout
        port = next(each["port"] for each in json.loads(before) if each["guestPort"] == 80)
        assert vmctl("forward", "--remove", machine.name, str(port)).stdout == f"Removed 127.0.0.1:{port} to port 80\n"
        again = vmctl("forward", "--remove", machine.name, str(port))
        assert one_line(again, "vmctl").endswith(f"no forward from 127.0.0.1:{port}")


def test_a_start_with_a_taken_port_fails(qemu: str, tmp_path: Path) -> None:
    image = make_raw(tmp_path / "boot", 1 << 20)
    name = fresh_name()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        forward = f"--forward={taken.getsockname()[1]}:80"
        done = run_vmspawn("-M", name, f"--qemu={qemu}", f"--image={image}", "--ram=64M", forward)
    assert done.returncode == 1
    assert "has the port" in one_line(done, "vmspawn")
    assert is_gone(name)
