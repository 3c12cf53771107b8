# SPDX-License-Identifier: LGPL-2.1-or-later
"""A pytest plugin: fixtures that are virtual machines.

pytest loads this module in every environment that vmspawn is installed in, so it imports nothing but pytest until one
of its fixtures is used.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from . import sync
    from .api.machine import Machine
    from .testing.lab import Lab, LabMachine

_LAB = pytest.StashKey["Lab"]()
_CONSOLE = pytest.StashKey[int]()

_MARKER = (
    "vm(**options): options for the machine of this test: the keyword arguments of vmspawn.Machine; "
    "disks=[…] to attach, each a path, a vmspawn.Disk or a size such as '64M'; ready='…', what its console "
    "shows when it is up"
)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options."""
    group = parser.getgroup("vmspawn", "virtual machines (vmspawn)")
    group.addoption(
        "--vm-qemu", metavar="PATH", action="append", default=[], help="QEMU to use; repeated, each test runs with each"
    )
    group.addoption(
        "--vm-machine-type",
        metavar="TYPE",
        action="append",
        default=[],
        help="machine type: q35, pc or virt; repeated, each test runs with each",
    )
    group.addoption("--vm-keep", action="store_true", help="leave the machines of failed tests running")
    group.addoption("--vm-console", action="store_true", help="show the consoles of the machines while they run")
    group.addoption(
        "--vm-required", action="store_true", help="fail the tests that lack a QEMU, instead of skipping them"
    )


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> Generator[None, object, object]:
    """Keep our standard error from before pytest captures it, to show consoles on."""
    if getattr(early_config.known_args_namespace, "vm_console", False):
        early_config.stash[_CONSOLE] = os.dup(2)
    return (yield)


def pytest_configure(config: pytest.Config) -> None:
    """Add the marker, and refuse options that contradict each other."""
    config.addinivalue_line("markers", _MARKER)
    if config.getoption("vm_console") and getattr(config.option, "numprocesses", None):
        raise pytest.UsageError("--vm-console does not work with -n: the machines run in other processes")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run tests with each QEMU and machine type that was asked for, unless their marker names one."""
    marked = {name for mark in metafunc.definition.iter_markers("vm") for name in mark.kwargs}
    for fixture, field in (("vm_qemu", "qemu"), ("vm_machine_type", "machine_type")):
        values = metafunc.config.getoption(fixture)
        if len(values) > 1 and fixture in metafunc.fixturenames and field not in marked:
            metafunc.parametrize(fixture, values, indirect=True, scope="session")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add what is known of a test's machines to the report of its failure."""
    report = yield
    lab = item.config.stash.get(_LAB, None)
    if lab is not None and report.failed:
        lab.report(item, report)
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say which machines were left running."""
    reports = [report for reports in terminalreporter.stats.values() for report in reports]
    names = [value for report in reports for key, value in getattr(report, "user_properties", ()) if key == "vm-kept"]
    if names:
        terminalreporter.section("machines that were left running (--vm-keep)")
        for name in dict.fromkeys(names):
            terminalreporter.write_line(f"vmctl console {name}    end it: vmctl terminate {name}")


def pytest_unconfigure(config: pytest.Config) -> None:
    """Close what was opened."""
    if (console := config.stash.get(_CONSOLE, None)) is not None:
        del config.stash[_CONSOLE]
        os.close(console)


@pytest.fixture(scope="session")
def vm_qemu(request: pytest.FixtureRequest) -> str | None:
    """The QEMU that --vm-qemu names, or None for the system's."""
    return getattr(request, "param", None) or next(iter(request.config.getoption("vm_qemu")), None)


@pytest.fixture(scope="session")
def vm_machine_type(request: pytest.FixtureRequest) -> str:
    """The machine type that --vm-machine-type names, or q35."""
    return getattr(request, "param", None) or next(iter(request.config.getoption("vm_machine_type")), "q35")


@pytest.fixture(scope="session")
def _vm_lab(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    from .testing.lab import Lab

    config = request.config
    lab = config.stash[_LAB] = Lab(
        tmp_path_factory.mktemp("vmspawn"),
        console=config.stash.get(_CONSOLE, None),
        keep=config.getoption("vm_keep"),
        required=config.getoption("vm_required"),
    )
    return lab


@pytest.fixture(scope="session")
def vmspawn_factory(_vm_lab: Lab, vm_qemu: str | None, vm_machine_type: str) -> Callable[..., LabMachine]:
    """Make machines, for fixtures of your own and of any scope:

        @pytest.fixture(scope="module")
        def server(vmspawn_factory):
            with vmspawn_factory(image="server.qcow2", ephemeral=True, ready="login: ") as machine:
                yield machine

    The keyword arguments are those of `vmspawn.Machine`, with `disks` and `ready` as the marker `vm` has them. Without
    `image`, `linux` or `directory` it is the built-in guest. The machine is one of `vmspawn.sync`.
    """

    def make(**options: Any) -> LabMachine:
        return _vm_lab.machine("vm", {"qemu": vm_qemu, "machine_type": vm_machine_type, **options})

    return make


@pytest.fixture
def _vm_of_test(request: pytest.FixtureRequest, _vm_lab: Lab, vm_qemu: str | None, vm_machine_type: str) -> LabMachine:
    options: dict[str, Any] = {"qemu": vm_qemu, "machine_type": vm_machine_type}
    for mark in reversed(list(request.node.iter_markers("vm"))):
        options |= mark.kwargs
    return _vm_lab.machine(request.node.name, options)


@pytest.fixture
def vm(_vm_of_test: LabMachine) -> Iterator[sync.Machine]:
    """A running machine of this test's own: the built-in guest, or what the marker `vm` asks for.

    It is a `vmspawn.sync.Machine`.
    """
    with _vm_of_test as machine:
        yield machine


@pytest.fixture
def async_vm(_vm_of_test: LabMachine) -> Iterator[Machine]:
    """The same for asynchronous tests, of pytest-asyncio or anyio: a `vmspawn.Machine`.

    It lives on an event loop of its own, so it does not matter which loop the test runs on.
    """
    from .testing.elsewhere import elsewhere

    with _vm_of_test as machine:
        yield elsewhere(machine._inner)


@pytest.fixture(scope="session")
def vm_session(vmspawn_factory: Callable[..., LabMachine]) -> Iterator[sync.Machine]:
    """One running machine with the built-in guest for all tests of the session, or of each worker of pytest-xdist.

    It is a `vmspawn.sync.Machine`.
    """
    with vmspawn_factory() as machine:
        yield machine
