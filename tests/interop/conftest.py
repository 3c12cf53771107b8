# SPDX-License-Identifier: LGPL-2.1-or-later
"""Defines the fixtures of the tests in the box, a container (see box.py): one booted box, and machines in it."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.interop.box import Box, reason_unavailable
from tests.interop.machines import BoxedMachine


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark all tests of this directory."""
    folder = Path(__file__).parent
    for item in items:
        if folder in item.path.parents:
            item.add_marker(pytest.mark.interop)


@pytest.fixture(scope="session")
def box() -> Iterator[Box]:
    """Boot a box. Skips the test with the reason if that is impossible."""
    if reason := reason_unavailable():
        pytest.skip(reason)
    with Box() as booted:
        booted.take_guest()
        yield booted


@pytest.fixture
def spawn(box: Box) -> Iterator[Callable[..., BoxedMachine]]:
    """Return a function that starts machines in the box, each in a transient unit. They end with the test."""
    with ExitStack() as machines:

        def start(*arguments: str, unit: tuple[str, ...] = (), name: str | None = None) -> BoxedMachine:
            machine = BoxedMachine(box, arguments, unit=unit, name=name)
            machines.callback(machine.close)
            return machine

        yield start


@pytest.fixture
def idle(box: Box, spawn: Callable[..., BoxedMachine]) -> BoxedMachine:
    """Start a machine that stays in its firmware."""
    machine = spawn(f"--image={make_image(box)}", "--firmware=bios", "--ram=64M", "--console=headless")
    machine.wait_for("is running")
    return machine


def make_image(box: Box, size: int = 1 << 20) -> str:
    """Make a sparse image in the box, and return its path there."""
    from tests.machines import fresh_name

    path = f"/var/tmp/{fresh_name()}.raw"
    with box.path(path).open("wb") as file:
        file.truncate(size)
    return path
