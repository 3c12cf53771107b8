# SPDX-License-Identifier: LGPL-2.1-or-later
"""Provides pytest fixtures that are virtual machines.

pytest loads this module in every environment that has vmspawn, so it imports only pytest until a fixture is used.
"""

from __future__ import annotations

import os
import sys
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
    "vm(**options): options of this test's machine: keyword arguments of vmspawn.Machine; disks=[…], disks to attach, "
    "each a path, a vmspawn.Disk or a size such as '64M'; ready='…', the console output that marks the machine as ready"
)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the command-line options."""
    group = parser.getgroup("vmspawn", "virtual machines (vmspawn)")
    group.addoption(
        "--vm-qemu",
        metavar="PATH",
        action="append",
        default=[],
        help="QEMU to use; repeatable, to run each test once with each QEMU",
    )
    group.addoption(
        "--vm-machine-type",
        metavar="TYPE",
        action="append",
        default=[],
        help="machine type: q35, pc or virt; repeatable, to run each test once with each type",
    )
    group.addoption("--vm-keep", action="store_true", help="leave the machines of failed tests running")
    group.addoption("--vm-console", action="store_true", help="show the consoles of the machines while they run")
    group.addoption(
        "--vm-required", action="store_true", help="fail the tests that lack a QEMU, instead of skipping them"
    )


# Old versions of pytest, such as Debian 12's, would fail on `wrapper` in every test run, because each run loads this
# module.
@pytest.hookimpl(hookwrapper=True, tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> Generator[None, None, None]:
    """Duplicate standard error before pytest captures it, to show consoles there."""
    if getattr(early_config.known_args_namespace, "vm_console", False):
        early_config.stash[_CONSOLE] = os.dup(2)
    yield


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker, and refuse contradictory options."""
    config.addinivalue_line("markers", _MARKER)
    if config.getoption("vm_console") and getattr(config.option, "numprocesses", None):
        raise pytest.UsageError("--vm-console does not work with -n: the machines run in other processes")
    if testinfra := sys.modules.get("testinfra.backend"):
        # testinfra imports the backend when a test asks for vmspawn://NAME.
        testinfra.BACKENDS.setdefault("vmspawn", "vmspawn.testing.testinfra_backend.VmspawnBackend")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run each test with every QEMU and every machine type of the options. Those in the test's marker replace them."""
    marked = {name for mark in metafunc.definition.iter_markers("vm") for name in mark.kwargs}
    for fixture, field in (("vm_qemu", "qemu"), ("vm_machine_type", "machine_type")):
        values = metafunc.config.getoption(fixture)
        if len(values) > 1 and fixture in metafunc.fixturenames and field not in marked:
            metafunc.parametrize(fixture, values, indirect=True, scope="session")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, None]:
    """Add sections about a failed test's machines to its report."""
    report: pytest.TestReport = (yield).get_result()
    lab = item.config.stash.get(_LAB, None)
    if lab is not None and report.failed:
        lab.report(item, report)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """List the machines that were left running."""
    reports = [report for reports in terminalreporter.stats.values() for report in reports]
    names = [value for report in reports for key, value in getattr(report, "user_properties", ()) if key == "vm-kept"]
    if names:
        terminalreporter.section("machines that were left running (--vm-keep)")
        for name in dict.fromkeys(names):
            terminalreporter.write_line(f"vmctl console {name}    end it: vmctl terminate {name}")


def pytest_unconfigure(config: pytest.Config) -> None:
    """Close the duplicate of standard error."""
    if (console := config.stash.get(_CONSOLE, None)) is not None:
        del config.stash[_CONSOLE]
        os.close(console)


@pytest.fixture(scope="session")
def vm_qemu(request: pytest.FixtureRequest) -> str | None:
    """Return the QEMU that --vm-qemu names, or None for the system's QEMU."""
    return getattr(request, "param", None) or next(iter(request.config.getoption("vm_qemu")), None)


@pytest.fixture(scope="session")
def vm_machine_type(request: pytest.FixtureRequest) -> str:
    """Return the machine type that --vm-machine-type names, or q35."""
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
    """Return a function that makes machines, for your own fixtures of any scope:

        @pytest.fixture(scope="module")
        def server(vmspawn_factory):
            with vmspawn_factory(image="server.qcow2", ephemeral=True, ready="login: ") as machine:
                yield machine

    The keyword arguments are the fields of `vmspawn.Machine`, and `disks` and `ready` as in the marker `vm`. Without
    `image`, `linux` or `directory`, the machine has the built-in guest. With `snapshot`, which is a `Snapshot` or its
    name, the machine is a copy. The result is a `vmspawn.sync.Machine`.
    """

    def make(**options: Any) -> LabMachine:
        return _vm_lab.machine("vm", _with_defaults(options, vm_qemu, vm_machine_type))

    return make


def _with_defaults(options: dict[str, Any], qemu: str | None, machine_type: str) -> dict[str, Any]:
    """Add the command line's QEMU and machine type to a machine's options, unless the machine is a copy."""
    return options if options.get("snapshot") else {"qemu": qemu, "machine_type": machine_type, **options}


@pytest.fixture
def _vm_of_test(request: pytest.FixtureRequest, _vm_lab: Lab, vm_qemu: str | None, vm_machine_type: str) -> LabMachine:
    options: dict[str, Any] = {}
    for mark in reversed(list(request.node.iter_markers("vm"))):
        options |= mark.kwargs
    return _vm_lab.machine(request.node.name, _with_defaults(options, vm_qemu, vm_machine_type))


@pytest.fixture
def vm(_vm_of_test: LabMachine) -> Iterator[sync.Machine]:
    """Start a machine for one test: the built-in guest, or the machine that the marker `vm` describes.

    The value is a `vmspawn.sync.Machine`.
    """
    with _vm_of_test as machine:
        yield machine


@pytest.fixture
def async_vm(_vm_of_test: LabMachine) -> Iterator[Machine]:
    """Start a machine for one asynchronous test, of pytest-asyncio or anyio.

    The value is a `vmspawn.Machine`. It has its own event loop, so the test may run on any loop.
    """
    from .testing.elsewhere import elsewhere

    with _vm_of_test as machine:
        yield elsewhere(machine._inner)


@pytest.fixture(scope="session")
def vm_session(vmspawn_factory: Callable[..., LabMachine]) -> Iterator[sync.Machine]:
    """Start one machine with the built-in guest for all tests of the session, or of each worker of pytest-xdist.

    The value is a `vmspawn.sync.Machine`.
    """
    with vmspawn_factory() as machine:
        yield machine
