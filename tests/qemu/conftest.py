# SPDX-License-Identifier: LGPL-2.1-or-later
"""Defines the fixtures that the tests of QMP and of disks share."""

from collections.abc import AsyncIterator, Iterator

import pytest
import pytest_asyncio

from tests import machines
from tests.conftest import make_raw
from tests.dying import Dying
from tests.machines import idle_machine, unchanged
from tests.qemu.qmp_fixtures import PC, Kind, Machine, Server, Side, kinds, shared


@pytest.fixture(scope="session", params=list(Kind), ids=lambda kind: kind.name.lower())
def kind(request: pytest.FixtureRequest) -> Kind:
    """Return the option that defines QEMU's monitors. A test runs once for each option that this QEMU supports."""
    assert isinstance(request.param, Kind)
    return request.param


@pytest.fixture(scope="module")
def both(qemu: str, kind: Kind) -> Iterator[tuple[Machine, Server]]:
    """Start a QEMU with a q35 machine, and a multiplexer. Monitors 2 and 3 are left for clients of QEMU itself."""
    with shared(qemu, monitors=4, arguments=PC, kind=kind) as made:
        yield made


@pytest.fixture(params=["native", "session"])
def side(request: pytest.FixtureRequest, both: tuple[Machine, Server]) -> Iterator[Side]:
    """Yield a side to test: QEMU itself, or a session of the same QEMU. A fact must hold for both."""
    with Side(request.param, *both) as opened:
        yield opened


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Remove the tests of an option for monitors that their QEMU lacks, instead of skipping each."""
    items[:] = [item for item in items if _is_possible(item)]


def _is_possible(item: pytest.Item) -> bool:
    parameters = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
    kind = parameters.get("kind")
    return not isinstance(kind, Kind) or kind in kinds(parameters["qemu"])


@pytest.fixture(scope="module")
def options(qemu: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Return vmspawn's options for a machine that boots nothing: its guest is its firmware."""
    image = make_raw(tmp_path_factory.mktemp("image") / "image", 1 << 20)
    return (f"--qemu={qemu}", f"--image={image}", "--ram=64M")


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["q35", "pc"])
async def machine(
    request: pytest.FixtureRequest, qemu: str, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[machines.Machine]:
    """Run a machine of type q35 or pc that has eight ports and stays in its firmware."""
    folder = tmp_path_factory.mktemp("machine")
    async with idle_machine(qemu, folder, machine_type=request.param, hotplug_ports=8) as running:
        yield running


@pytest_asyncio.fixture(loop_scope="module")
async def nothing_left(machine: machines.Machine) -> AsyncIterator[None]:
    """Check that a test leaves the machine as it found it."""
    async with unchanged(machine):
        yield


@pytest.fixture(scope="module")
def doomed() -> Iterator[Dying]:
    """Return a process that starts managers which kill themselves."""
    process = Dying()
    yield process
    process.close()
