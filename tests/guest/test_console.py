# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests vmspawn on a terminal: typing, pasting, keys, window sizes, and other viewers."""

import os
import re
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pyte
import pytest

from tests.commands import DEADLINE, VMCTL, background, vmctl
from tests.terminal import END, POWER_OFF, PROMPT, READY, REBOOT, Seated, Tty, attached, seated, terminal
from vmspawn.host.runtime import CONSOLE, runtime_root

#: All byte values, 100 kB in total, without two consecutive ^].
EVERYTHING = bytes(range(256)) * 400


@pytest.fixture(scope="module", params=["serial", "virtio"])
def seat(qemu: str, request: pytest.FixtureRequest) -> Iterator[Seated]:
    """Boot a guest on a terminal, and wait for its prompt."""
    with seated(f"--qemu={qemu}", "--guest=builtin", f"--console-transport={request.param}") as machine:
        machine.expect(READY)
        machine.expect(PROMPT)
        yield machine


@pytest.fixture(scope="module")
def serial(qemu: str) -> Iterator[Seated]:
    """Start a guest that has booted, with its console on the serial port."""
    with seated(f"--qemu={qemu}", "--guest=builtin", "--warm") as machine:
        machine.expect(READY)
        machine.expect(PROMPT)
        yield machine


def receive_raw(machine: Seated, count: int) -> None:
    """Make the guest read `count` raw bytes, and print them between two marks."""
    machine.type(b"stty raw -echo; echo rea''dy; head -c %d >/tmp/in; printf '<'; cat /tmp/in; " % count)
    machine.type(b"printf '>'; stty sane; echo\n")
    machine.expect(rb"ready\n")


def test_the_guest_knows_the_terminals_type_and_size(seat: Seated) -> None:
    assert seat.run("echo $TERM; stty size").splitlines()[-2:] == [b"xterm-256color", b"24 80"]


def test_the_first_line_lists_the_key_sequences(seat: Seated) -> None:
    first = bytes(seat.everything).splitlines()[0]
    assert all(keys in first for keys in (b"^]", b"^]^]p", b"^]^]r"))


def test_ctrl_c_interrupts_a_program_in_the_guest_and_not_vmspawn(seat: Seated) -> None:
    # The message comes from the foreground process, which Ctrl-C interrupts.
    seat.type(b"sh -c 'echo star\"\"ted; exec sleep 1000'\n")
    seat.expect(rb"started\r\n")
    seat.type(b"\x03")
    seat.expect(PROMPT)
    assert seat.process.poll() is None


def test_100_kilobytes_are_pasted_and_come_back_unchanged(serial: Seated) -> None:
    receive_raw(serial, len(EVERYTHING))
    serial.type(EVERYTHING)
    serial.expect(rb"<")
    serial.expect(rb">\r\n")
    # The pasted bytes contain both marks, so continue to the last ">".
    while len(serial.before) < len(EVERYTHING):
        so_far = serial.before + b">\r\n"
        serial.expect(rb">\r\n")
        serial.before = so_far + serial.before
    assert serial.before == EVERYTHING


@pytest.mark.parametrize("typed", [b"\x1dx", b"\x1d\x1dx", b"\x1dp", b"\x1dr", b"\x1d\x1d\x03", b"p\x1d"])
def test_input_that_is_no_key_sequence_reaches_the_guest(serial: Seated, typed: bytes) -> None:
    receive_raw(serial, len(typed))
    serial.type(typed)
    serial.expect(rb"<")
    serial.expect(rb">\r\n")
    assert serial.before == typed


def test_slow_escapes_reach_the_guest(serial: Seated) -> None:
    """Each ^] is typed after the guest has received the previous one, which vmspawn holds back for a second."""
    serial.type(b"stty raw -echo; echo rea''dy; dd bs=1 count=4 2>/dev/null | od -An -v -tx1 -w1; stty sane\n")
    serial.expect(rb"ready\n")
    for _ in range(3):
        serial.type(b"\x1d")
        serial.expect(rb" 1d\r?\n")
    serial.type(b"p")
    serial.expect(rb" 70\r?\n")
    serial.expect(PROMPT)


def test_the_guest_gets_each_new_size_of_the_window(seat: Seated) -> None:
    seat.resize(41, 133)
    seat.run('until [ "$(stty size)" = "41 133" ]; do usleep 50000; done')
    seat.resize(24, 80)
    seat.run('until [ "$(stty size)" = "24 80" ]; do usleep 50000; done')


def test_ctrl_alt_delete_reboots_and_the_guest_gets_the_windows_size_again(seat: Seated) -> None:
    seat.resize(33, 99)
    seat.type(REBOOT)
    seat.expect(READY)
    seat.expect(PROMPT)
    seat.run('until [ "$(stty size)" = "33 99" ]; do usleep 50000; done')
    seat.resize(24, 80)


# Other viewers


@pytest.fixture
def visitor(serial: Seated) -> Iterator[Tty]:
    """Attach `vmctl console` on another terminal."""
    serial.type(b"\n")
    serial.expect(PROMPT)
    with attached(serial.name) as tty:
        tty.expect(PROMPT)
        yield tty


def test_several_clients_see_the_console_and_type(serial: Seated, visitor: Tty) -> None:
    with terminal() as third:
        process = third.start([*VMCTL, "console", serial.name, "--read-only"])
        third.expect(PROMPT)
        third.type(b"echo not''hing\n")
        visitor.type(b"echo some''thing\n")
        for each in (serial, visitor, third):
            each.expect(rb"something")
            assert b"nothing" not in each.before
        third.type(END)
        assert third.wait(process) == 0
    visitor.type(END)
    assert visitor.wait(visitor.processes[0]) == 0
    visitor.expect(rb"continues")
    serial.run("true")


def test_the_last_64_kilobytes_are_replayed(serial: Seated) -> None:
    serial.run("seq 1 20000")
    with background(
        [*VMCTL, "console", serial.name, "--read-only", "-q"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
    ) as watcher:
        assert watcher.stdout is not None
        replayed = b""
        while len(replayed) < 65536:
            replayed += os.read(watcher.stdout.fileno(), 65536)
        watcher.terminate()
        assert watcher.wait(timeout=20) == 128 + 15
    serial.drain()
    assert len(replayed) == 65536
    assert bytes(serial.everything).endswith(replayed)


def test_a_megabyte_at_once_is_shown_to_the_last_byte_though_a_client_hangs(serial: Seated) -> None:
    """The output exceeds the client's buffers, and the manager's memory does not grow."""
    before = resident(serial.process.pid)
    with socket.socket(socket.AF_UNIX) as stuck:
        stuck.connect(os.path.join(runtime_root(), serial.name, CONSOLE))
        lines = serial.run("seq 1 140000").split(b"\r\n")
        assert lines[1:-1] == [b"%d" % number for number in range(1, 140001)]
        # The client was disconnected.
        stuck.settimeout(DEADLINE)
        while stuck.recv(1 << 20):
            pass
    # The replayed output and the client's unread output are bounded.
    assert resident(serial.process.pid) - before < 1 << 20


def resident(pid: int) -> int:
    """Return a process's resident memory in bytes."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found
    return int(found[1]) << 10


def test_a_client_on_pipes_types_and_shows_output(serial: Seated) -> None:
    with background([*VMCTL, "console", serial.name, "-q"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as piped:
        assert piped.stdin is not None
        assert piped.stdout is not None
        # ^U discards an incomplete line.
        piped.stdin.write(b"\x15echo pi''ped\n")
        piped.stdin.close()
        shown = b""
        while b"piped\r\n" not in shown:
            shown += os.read(piped.stdout.fileno(), 65536)
        piped.terminate()
        piped.wait(timeout=20)
    serial.expect(rb"piped\r\n")


# The end of a booted guest


@pytest.fixture
def guest(qemu: str) -> Iterator[Seated]:
    """Start a guest that has booted, for one test."""
    with seated(f"--qemu={qemu}", "--guest=builtin", "--warm") as machine:
        machine.expect(READY)
        machine.expect(PROMPT)
        yield machine


def test_keys_power_the_guest_off_and_the_terminal_is_restored(qemu: str, tmp_path: Path) -> None:
    """The guest leaves colours, a hidden cursor, the alternate screen, line drawing and an unfinished title behind."""
    with seated(f"--qemu={qemu}", "--guest=builtin", f"--log={tmp_path / 'log'}") as guest:
        guest.expect(READY)
        guest.expect(PROMPT)
        guest.run(r"printf '\033[?1049h\033[31;44m\033[?25l\033(0\033[?7l\033]0;half'")
        guest.type(POWER_OFF)
        assert guest.ended() == 0
    assert b"the guest powered off" in guest.shown
    assert bytes(guest.everything).startswith(b"vmspawn: keys")
    # The transcript and the terminal have all output of the guest.
    transcript = (tmp_path / "log").read_bytes()
    assert b"power button pressed, powering off" in transcript
    assert guest.everything.rfind(b"\x1b[?1049l") > guest.everything.rfind(b"powering off")
    screen = pyte.Screen(80, 24)
    pyte.ByteStream(screen).feed(bytes(guest.everything) + b"shell$ qqq")
    assert pyte.modes.DECTCEM in screen.mode
    assert pyte.modes.DECAWM in screen.mode
    assert (screen.cursor.attrs.fg, screen.cursor.attrs.bg) == ("default", "default")
    assert any(line.rstrip().endswith("shell$ qqq") for line in screen.display)


def test_poweroff_with_wait_reports_a_paused_guest_and_its_end(guest: Seated) -> None:
    assert vmctl("pause", guest.name).returncode == 0
    with background([*VMCTL, "poweroff", guest.name, "--wait"], stderr=subprocess.PIPE, text=True) as waiting:
        assert waiting.stderr is not None
        assert "the guest cannot react: it is paused" in waiting.stderr.readline()
        assert vmctl("resume", guest.name).returncode == 0
        assert guest.ended() == 0
        said = waiting.stderr.read()
        assert waiting.wait(timeout=20) == 0
    assert said.splitlines()[-1] == "vmctl: the guest powered off"


def test_a_panic_is_reported_on_the_terminal_and_as_events(guest: Seated) -> None:
    with background([*VMCTL, "events", guest.name, "--json=short"], stdout=subprocess.PIPE) as events:
        assert events.stdout is not None
        assert b"READY" in events.stdout.readline()
        guest.type(b"echo c >/proc/sysrq-trigger\n")
        guest.expect(rb"Kernel panic")
        assert guest.ended() == 1
        told = events.stdout.read()
    assert b"the guest's kernel panicked" in guest.shown
    assert b'{"event":"GUEST_PANICKED"' in told
    assert b'"reason":"guest-panic"' in told.splitlines()[-1]
