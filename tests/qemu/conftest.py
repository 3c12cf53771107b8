# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the tests of QMP share, and those of disks."""

from collections.abc import AsyncIterator, Iterator

import pytest
import pytest_asyncio

from tests import machines
from tests.conftest import make_raw
from tests.machines import idle_machine, unchanged
from tests.qemu.qmp_fixtures import PC, Kind, Machine, Server, Side, kinds, shared


@pytest.fixture(scope="session", params=list(Kind), ids=lambda kind: kind.name.lower())
def kind(request: pytest.FixtureRequest) -> Kind:
    """How the QEMU of `qemu` is told to serve its monitors: each way that it knows."""
    assert isinstance(request.param, Kind)
    return request.param


@pytest.fixture(scope="module")
def both(qemu: str, kind: Kind) -> Iterator[tuple[Machine, Server]]:
    """A QEMU that has a PC to run, whose monitors 2 and 3 are for native clients, and a multiplexer."""
    with shared(qemu, monitors=4, arguments=PC, kind=kind) as made:
        yield made


@pytest.fixture(params=["native", "session"])
def side(request: pytest.FixtureRequest, both: tuple[Machine, Server]) -> Iterator[Side]:
    """Who is asked: QEMU itself, or a session of the same QEMU. A fact is a fact for both."""
    with Side(request.param, *both) as opened:
        yield opened


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave out what a QEMU does not know, rather than skip each test of it."""
    items[:] = [item for item in items if _is_possible(item)]


def _is_possible(item: pytest.Item) -> bool:
    parameters = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
    kind = parameters.get("kind")
    return not isinstance(kind, Kind) or kind in kinds(parameters["qemu"])


@pytest.fixture(scope="module")
def options(qemu: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """A vmspawn's options for a machine that boots nothing: its guest is its firmware."""
    image = make_raw(tmp_path_factory.mktemp("image") / "image", 1 << 20)
    return (f"--qemu={qemu}", f"--image={image}", "--ram=64M")


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["q35", "pc"])
async def machine(
    request: pytest.FixtureRequest, qemu: str, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[machines.Machine]:
    """A machine of either type with eight ports, whose guest is its firmware."""
    folder = tmp_path_factory.mktemp("machine")
    async with idle_machine(qemu, folder, machine_type=request.param, hotplug_ports=8) as running:
        yield running


@pytest_asyncio.fixture(loop_scope="module")
async def nothing_left(machine: machines.Machine) -> AsyncIterator[None]:
    """A test must leave the machine as it found it."""
    async with unchanged(machine):
        yield
