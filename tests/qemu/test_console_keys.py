# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests the keys through a real terminal: each sequence, split at each byte, typed at several speeds.

tests/unit/test_hotkeys.py tests the matcher. Here each piece is read separately.
"""

import contextlib
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import pytest

from tests.bootsector import make_echoing_boot_sector
from tests.commands import DEADLINE, Spawned, idle, vmctl
from tests.conftest import make_raw
from tests.terminal import END, POWER_OFF, REBOOT, Seated, Tty, attached, seated
from vmspawn.console.hotkeys import ESCAPE, WINDOW

#: Seconds between two pieces, as of a repeated key and of a slow typist, who leaves a busy host time to read.
SPEEDS = (0.02, 0.25)

#: Seconds within which the program must have read a sequence, so that it certainly takes effect.
IN_TIME = 0.8 * WINDOW

#: The sizes of the pieces, and the pause between two pieces.
CASES = [((3,), 0.0), *product(((1, 2), (2, 1), (1, 1, 1)), SPEEDS)]


def split(keys: bytes, sizes: tuple[int, ...]) -> list[bytes]:
    """Return the keys in pieces of these sizes."""
    ends = [sum(sizes[:count]) for count in range(1, len(sizes) + 1)]
    return [keys[end - size : end] for end, size in zip(ends, sizes, strict=True)]


def press(tty: Tty, pieces: list[bytes], pause: float, expect: Callable[[float], object]) -> None:
    """Type keys, and wait for their effect, for which `expect` waits a number of seconds.

    The keys must take effect at once, except on a host so busy that the program may have read them too late.
    """
    for _ in range(4):
        if tty.type_slowly(pieces, pause) < IN_TIME:
            break
        with contextlib.suppress(AssertionError):
            expect(12.0)
            return
    else:
        tty.type_slowly(pieces, pause)
    expect(DEADLINE)


def shows(tty: Tty, pattern: bytes) -> Callable[[float], object]:
    return lambda seconds: tty.expect(pattern, timeout=seconds)


@pytest.fixture
def machine(options: tuple[str, ...]) -> Iterator[Seated]:
    """Run a machine whose guest ignores the power button.

    Each test has its own machine, because a key that was ignored for ten seconds then ends the machine.
    """
    with seated(*options) as running:
        running.expect(rb"is running[^\n]*\n")
        running.wait_until_raw()
        yield running


@pytest.fixture(scope="module")
def headless(qemu: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Spawned]:
    """Run a machine to attach to."""
    with idle(qemu, tmp_path_factory.mktemp("headless")) as running:
        yield running


@pytest.mark.parametrize(("sizes", "pause"), CASES)
def test_keys_ask_the_guest_to_reboot_or_power_off(machine: Seated, sizes: tuple[int, ...], pause: float) -> None:
    for keys, what in ((REBOOT, b"reboot"), (POWER_OFF, b"power off")):
        press(machine, split(keys, sizes), pause, shows(machine, rb"asked the guest to %b\r\n" % what))


def test_keys_that_are_too_slow_are_for_the_guest(options: tuple[str, ...], tmp_path: Path) -> None:
    """The guest sends them back. Keys that are typed in time afterwards take effect: the slow ones are forgotten."""
    with seated(*options, f"--image={make_echoing_boot_sector(tmp_path / 'boot')}") as machine:
        machine.expect(rb"is running[^\n]*\n")
        machine.wait_until_raw()
        machine.type_slowly(split(END, (1, 1, 1)), 1.5)
        machine.type_slowly(split(REBOOT, (1, 2)), 1.5)
        machine.expect(END + REBOOT)
        assert b"asked" not in machine.before
        machine.type(POWER_OFF)
        machine.expect(rb"asked the guest to power off\r\n")
        assert ESCAPE not in machine.before


@pytest.mark.parametrize(("sizes", "pause"), CASES)
def test_keys_detach_from_the_console(headless: Spawned, sizes: tuple[int, ...], pause: float) -> None:
    with attached(headless.name) as tty:
        (process,) = tty.processes
        press(tty, split(END, sizes), pause, lambda seconds: tty.wait(process, timeout=seconds))
        assert process.wait() == 0
    assert vmctl("status", headless.name).returncode == 0


@pytest.mark.parametrize(("sizes", "pause"), CASES)
def test_keys_end_the_machine(qemu: str, tmp_path: Path, sizes: tuple[int, ...], pause: float) -> None:
    image = make_raw(tmp_path / "image", 1 << 20)
    with seated(f"--qemu={qemu}", f"--image={image}", "--ram=64M") as machine:
        machine.expect(rb"is running")
        machine.wait_until_raw()
        press(machine, split(END, sizes), pause, lambda seconds: machine.ended(timeout=seconds))
        assert machine.process.wait() == 0
        assert b"^]^]^]: ending the machine" in machine.shown
