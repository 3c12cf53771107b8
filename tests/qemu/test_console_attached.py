# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests `vmctl console` on a terminal, attached to a machine whose guest is its firmware."""

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.commands import VMCTL, Spawned, idle, qemu_pid, vmctl
from tests.terminal import END, attached, shell_job, terminal


@pytest.fixture(scope="module")
def headless(qemu: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Spawned]:
    """Run a machine to attach to."""
    with idle(qemu, tmp_path_factory.mktemp("headless")) as running:
        yield running


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT])
def test_a_signal_ends_an_attachment_and_not_the_machine(headless: Spawned, number: signal.Signals) -> None:
    with attached(headless.name) as tty:
        (process,) = tty.processes
        process.send_signal(number)
        assert tty.wait(process) == 128 + number
    assert vmctl("status", headless.name).returncode == 0


def test_an_attachment_stops_and_continues_as_a_job_of_a_shell(headless: Spawned) -> None:
    with terminal() as tty:
        shell = tty.start(["bash", "--norc", "--noediting", "-i"], PS1="$ ")
        tty.type(" ".join([*VMCTL, "console", headless.name, "\n"]).encode())
        tty.expect(rb"\^\]\^\]\^\] detaches")
        tty.wait_until_raw()
        os.kill(shell_job(shell.pid), signal.SIGTSTP)
        tty.expect(rb"Stopped")
        assert tty.settings() == tty.settings_before
        tty.type(b"fg\n")
        tty.wait_until_raw()
        tty.type(END)
        tty.expect(rb"continues")
        tty.type(b"exit\n")
        assert tty.wait(shell) == 0


@pytest.mark.parametrize("victim", ["QEMU", "manager"])
def test_an_attachment_ends_with_its_machine_or_manager(qemu: str, tmp_path: Path, victim: str) -> None:
    with idle(qemu, tmp_path) as running:
        pid = qemu_pid(running.name)
        with attached(running.name) as tty, os.fdopen(os.pidfd_open(pid)) as pidfd:
            (process,) = tty.processes
            os.kill(pid if victim == "QEMU" else running.process.pid, signal.SIGKILL)
            assert tty.wait(process) == (0 if victim == "QEMU" else 1)
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd.fileno(), signal.SIGKILL)
