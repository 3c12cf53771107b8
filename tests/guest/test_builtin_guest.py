# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests the built-in guest on a plain QEMU: it prints its devices, and reacts to keys, signals and buttons."""

from __future__ import annotations

import itertools
import json
import re
import select
import shutil
import socket
import subprocess
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from vmspawn.guest import build, builtin

PROMPT = "vmspawn# "
READY = "vmspawn-guest: ready"

# Deadlines, not expectations: a boot takes two seconds, and much longer on a busy host.
BOOT_SECONDS = 60
ANSWER_SECONDS = 20

MACHINES = {
    "q35": ("x86_64", ("-machine", "q35"), "ttyS0"),
    "pc": ("x86_64", ("-machine", "pc"), "ttyS0"),
    "virt": ("aarch64", ("-machine", "virt,gic-version=3", "-cpu", "cortex-a57"), "ttyAMA0"),
}


class Guest:
    """A machine with the built-in guest, with its console and its monitor on socket pairs."""

    def __init__(self, qemu: str, machine: str, *options: str, console: str = "", arguments: str = "") -> None:
        architecture, machine_options, default_console = MACHINES[machine]
        guest = builtin.find(architecture) or build.build(architecture)
        append = " ".join((f"console={console or default_console}", *guest.arguments, arguments))
        self._console, console_end = socket.socketpair()
        self._monitor, monitor_end = socket.socketpair()
        with console_end, monitor_end:
            command = [
                *(qemu, "-accel", "tcg", *machine_options, "-m", "256"),
                *("-nodefaults", "-display", "none", "-no-reboot"),
                *("-kernel", guest.kernel, "-initrd", guest.initrd, "-append", append),
                *("-chardev", f"socket,id=console,fd={console_end.fileno()}"),
                *("-chardev", f"socket,id=monitor,fd={monitor_end.fileno()}"),
                *("-mon", "chardev=monitor,mode=control"),
                *(options if console else ("-serial", "chardev:console", *options)),
            ]
            descriptors = (console_end.fileno(), monitor_end.fileno())
            self.process = subprocess.Popen(command, pass_fds=descriptors, stdin=subprocess.DEVNULL)
        self._monitor.settimeout(ANSWER_SECONDS)
        self._replies = self._monitor.makefile("rb")
        assert b"QMP" in self._replies.readline()
        # Events that no `detach` has consumed. QEMU may send an event before the reply to its command.
        self._events: deque[Mapping[str, Any]] = deque()
        self.command("qmp_capabilities")
        #: Console output that no `expect` has consumed.
        self.pending = ""
        self._nodes = itertools.count()
        #: The lines that the guest printed before it was ready.
        self.boot_lines: list[str] = []

    def close(self) -> None:
        """Kill the machine if it runs, and close its sockets."""
        self.process.kill()
        self.process.wait(ANSWER_SECONDS)
        self._replies.close()
        self._monitor.close()
        self._console.close()

    def expect(self, pattern: str, seconds: float = ANSWER_SECONDS) -> re.Match[str]:
        """Wait until the console's output matches, and consume it up to the end of the match."""
        deadline = time.monotonic() + seconds
        while not (match := re.search(pattern, self.pending)):
            assert self._read(deadline), f"the console ended, or had no {pattern!r} in time: {self.pending!r}"
        self.pending = self.pending[match.end() :]
        return match

    def drain(self, seconds: float = ANSWER_SECONDS) -> str:
        """Wait until the machine ends, and return the console's output until then."""
        deadline = time.monotonic() + seconds
        while self._read(deadline):
            pass
        self.process.wait(max(0.0, deadline - time.monotonic()))
        return self.pending

    def _read(self, deadline: float) -> bool:
        if not select.select([self._console], [], [], max(0.0, deadline - time.monotonic()))[0]:
            return False
        data = self._console.recv(65536)
        self.pending += data.decode(errors="replace").replace("\r", "")
        return bool(data)

    def wait_for_shell(self) -> None:
        """Wait for the first prompt."""
        self.boot_lines = self.expect(f"(?s)(.*?){READY}\n", BOOT_SECONDS)[1].splitlines()
        self.expect(PROMPT)

    def type(self, text: str) -> None:
        """Send keys to the console."""
        self._console.sendall(text.encode())

    def run(self, line: str) -> str:
        """Run a line in the guest's shell, and return its output."""
        self.type(f"{line}; echo $((6*7))end\n")
        output = self.expect(r"(?s)6\*7\)\)end\n(.*?)42end\n")[1]
        self.expect(PROMPT)
        return output

    def command(self, name: str, **arguments: Any) -> None:
        """Run a QMP command."""
        self._monitor.sendall(json.dumps({"execute": name, "arguments": arguments}).encode())
        while "return" not in (message := json.loads(self._replies.readline())):
            assert "event" in message, message
            self._events.append(message)

    def has_ended(self, seconds: float) -> bool:
        """Wait for the machine's end. Returns False on timeout."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def attach(self, name: str, device: Mapping[str, Any], *, read_only: bool = False) -> None:
        """Plug in a disk that reads as zeroes."""
        node = {"driver": "null-co", "node-name": f"node{next(self._nodes)}", "size": 1 << 20, "read-zeroes": True}
        self.command("blockdev-add", **node, **{"read-only": read_only})
        self.command("device_add", **device, drive=node["node-name"], id=name)

    def detach(self, name: str) -> None:
        """Ask the guest to release the device, and wait until the device is removed. The block node stays."""
        self.command("device_del", id=name)
        while not self._gone(self._next_event(), name):
            pass

    def _next_event(self) -> Mapping[str, Any]:
        if self._events:
            return self._events.popleft()
        event: Mapping[str, Any] = json.loads(self._replies.readline())
        return event

    @staticmethod
    def _gone(message: Mapping[str, Any], name: str) -> bool:
        return message.get("event") == "DEVICE_DELETED" and message["data"].get("device") == name


@contextmanager
def booted(qemu: str, machine: str = "q35", *options: str, console: str = "", arguments: str = "") -> Iterator[Guest]:
    """Boot a machine, and kill it on exit."""
    guest = Guest(qemu, machine, *options, console=console, arguments=arguments)
    try:
        yield guest
    finally:
        guest.close()


def disk(node: str, size: int, *device: str, read_only: bool = False) -> tuple[str, ...]:
    """Return the options of QEMU for a boot disk."""
    blockdev = f"null-co,node-name={node},size={size},read-zeroes=on,read-only={'on' if read_only else 'off'}"
    return ("-blockdev", blockdev, "-device", f"{','.join(device)},drive={node}")


BOOT_DISKS = (
    *disk("n0", 64 << 20, "virtio-blk-pci", "serial=boot-blk"),
    *disk("n1", 32 << 20, "nvme", "serial=boot-nvme"),
    *("-device", "virtio-scsi-pci,id=scsi"),
    *disk("n2", 16 << 20, "scsi-hd", "bus=scsi.0", "serial=boot-scsi"),
    *disk("n3", 8 << 20, "scsi-cd", "bus=scsi.0", "serial=boot-cd", read_only=True),
)
PORTS = tuple(word for port in range(2) for word in ("-device", f"pcie-root-port,id=port{port},slot={port},chassis=1"))

VIRTIO_BLK = {"driver": "virtio-blk-pci", "bus": "port0", "addr": "0x0"}
NVME = {"driver": "nvme", "bus": "port1", "addr": "0x0"}
SCSI_DISK = {"driver": "scsi-hd", "bus": "scsi.0"}
SCSI_CD = {"driver": "scsi-cd", "bus": "scsi.0"}


@pytest.fixture(scope="module")
def guest(qemu: str) -> Iterator[Guest]:
    """Boot one q35 machine for all tests that do not change it."""
    # A wide terminal, so that the shell does not wrap the echo of a command
    with booted(qemu, "q35", *BOOT_DISKS, *PORTS, arguments="systemd.tty.columns.ttyS0=999") as guest:
        guest.wait_for_shell()
        yield guest


def came(name: str, serial: str, size: int = 1 << 20, mode: str = "read-write") -> str:
    """Return a pattern for the line that announces a device. Group 1 is the device's name."""
    return rf"(?m)^vmspawn-guest: block ({name}) came: {size} bytes, serial {re.escape(serial)}, {mode}\n"


def went(name: str) -> str:
    return f"(?m)^vmspawn-guest: block {name} went\n"


def test_names_each_disk_it_has_at_boot_once_and_before_it_is_ready(guest: Guest) -> None:
    assert sorted(guest.boot_lines) == [
        "vmspawn-guest: block nvme0n1 came: 33554432 bytes, serial boot-nvme, read-write",
        "vmspawn-guest: block sda came: 16777216 bytes, serial boot-scsi, read-write",
        "vmspawn-guest: block sr0 came: 8388608 bytes, serial boot-cd, read-only",
        "vmspawn-guest: block vda came: 67108864 bytes, serial boot-blk, read-write",
    ]


@pytest.mark.parametrize(
    ("link", "device"),
    [
        ("virtio-boot-blk", "vda"),
        ("nvme-QEMU_NVMe_Ctrl_boot-nvme", "nvme0n1"),
        ("nvme-QEMU_NVMe_Ctrl_boot-nvme_1", "nvme0n1"),
        ("scsi-0QEMU_QEMU_HARDDISK_boot-scsi", "sda"),
        ("scsi-0QEMU_QEMU_CD-ROM_boot-cd", "sr0"),
    ],
)
def test_links_disks_by_the_names_that_udev_gives(guest: Guest, link: str, device: str) -> None:
    assert guest.run(f"readlink -f /dev/disk/by-id/{link}") == f"/dev/{device}\n"


@pytest.mark.parametrize(
    ("device", "name", "link"),
    [
        (VIRTIO_BLK, "vd[a-z]", "virtio-"),
        (NVME, "nvme[0-9]n1", "nvme-QEMU_NVMe_Ctrl_"),
        (SCSI_DISK, "sd[a-z]", "scsi-0QEMU_QEMU_HARDDISK_"),
        (SCSI_CD, "sr[0-9]", "scsi-0QEMU_QEMU_CD-ROM_"),
    ],
)
def test_reports_a_disk_that_comes_and_goes(guest: Guest, device: dict[str, str], name: str, link: str) -> None:
    for attempt in range(3):
        serial = f"plug-{attempt}"
        guest.attach(serial, {**device, "serial": serial})
        found = guest.expect(came(name, serial, mode="read-(?:write|only)"))[1]
        assert guest.run(f"readlink -f /dev/disk/by-id/{link}{serial}") == f"/dev/{found}\n"
        guest.detach(serial)
        guest.expect(went(found))
        assert guest.run(f"ls /dev/disk/by-id | grep -c {serial}") == "0\n"


def test_reports_that_a_disk_is_read_only(guest: Guest) -> None:
    guest.attach("fixed", {**VIRTIO_BLK, "serial": "fixed"}, read_only=True)
    found = guest.expect(came("vd[a-z]", "fixed", mode="read-only"))[1]
    guest.detach("fixed")
    guest.expect(went(found))


def test_prints_a_dash_for_a_disk_without_a_serial_number(guest: Guest) -> None:
    guest.attach("nameless", VIRTIO_BLK)
    found = guest.expect(came("vd[a-z]", "-"))[1]
    guest.detach("nameless")
    guest.expect(went(found))


def test_links_a_scsi_disk_by_its_world_wide_name(guest: Guest) -> None:
    guest.attach("wide", {**SCSI_DISK, "serial": "wide", "wwn": 0x5000C50015EA71AC})
    found = guest.expect(came("sd[a-z]", "wide"))[1]
    links = "/dev/disk/by-id/scsi-35000c50015ea71ac /dev/disk/by-id/wwn-0x5000c50015ea71ac"
    assert guest.run(f"for link in {links}; do readlink -f $link; done") == f"/dev/{found}\n" * 2
    guest.detach("wide")
    guest.expect(went(found))


def test_reports_each_of_many_disks_that_come_at_once(guest: Guest) -> None:
    names = {f"many-{number}" for number in range(20)}
    for name in names:
        guest.attach(name, {**SCSI_DISK, "serial": name})
    lines = [guest.expect(r"(?m)^vmspawn-guest: block (sd\w+) came: .* serial (many-\d+),.*\n") for _ in names]
    assert {line[2] for line in lines} == names
    for name in names:
        guest.detach(name)
    gone = [guest.expect(went(r"(sd\w+)"))[1] for _ in names]
    assert sorted(gone) == sorted(line[1] for line in lines)
    assert guest.run("ls /dev/disk/by-id | grep -c many") == "0\n"


def start_a_job(guest: Guest) -> None:
    """Start an endless job, and wait for its message: until then, the shell itself would handle the keys."""
    guest.type("sh -c 'echo st\"\"arted; exec sleep 1000'\n")
    guest.expect("started\n")


def test_ctrl_c_interrupts_what_the_shell_runs(guest: Guest) -> None:
    start_a_job(guest)
    guest.type("\x03")
    guest.expect(PROMPT)
    assert guest.run("echo alive") == "alive\n"


def test_ctrl_z_stops_what_the_shell_runs(guest: Guest) -> None:
    start_a_job(guest)
    guest.type("\x1a")
    guest.expect("Stopped")
    guest.expect(PROMPT)
    guest.run("kill -KILL %1")


def test_a_new_shell_follows_one_that_exits(guest: Guest) -> None:
    old = guest.run("echo $$")
    guest.type("exit\n")
    guest.expect(PROMPT)
    assert guest.run("echo $$") != old
    assert guest.run("stty size; echo $TERM; hostname; pwd") == "24 999\nvt220\nvmspawn\n/root\n"


def test_leaves_no_zombies(guest: Guest) -> None:
    guest.run("(sh -c 'true & exec true' &)")
    guest.run("sh -c '(usleep 50000 &)'; usleep 200000")
    assert guest.run("ps -o stat | grep -c Z") == "0\n"


def test_keeps_a_file_system_on_a_disk(guest: Guest, tmp_path: Path) -> None:
    image = tmp_path / "image"
    with open(image, "wb") as file:
        file.truncate(16 << 20)
    guest.command("blockdev-add", **{"driver": "file", "node-name": "image", "filename": str(image)})
    guest.command("device_add", **VIRTIO_BLK, drive="image", id="image", serial="image")
    found = guest.expect(came("vd[a-z]", "image", 16 << 20))[1]
    guest.run(f"mke2fs /dev/{found} >/dev/null && mount -t ext4 /dev/{found} /mnt && echo kept >/mnt/file")
    assert guest.run(f"umount /mnt; mount /dev/{found} /mnt && cat /mnt/file; umount /mnt") == "kept\n"
    guest.detach("image")
    guest.expect(went(found))


def test_loads_the_module_of_a_file_system_at_a_mount(guest: Guest) -> None:
    guest.run("mount -t iso9660 /dev/sr0 /mnt 2>/dev/null")
    assert guest.run("grep -c iso9660 /proc/filesystems") == "1\n"


@pytest.mark.parametrize("machine", ["q35", "pc"])
def test_powers_off_at_the_power_button(qemu: str, machine: str) -> None:
    with booted(qemu, machine) as guest:
        guest.wait_for_shell()
        press_power_button(guest)


@pytest.mark.soak
@pytest.mark.skipif(not shutil.which("qemu-system-aarch64"), reason="there is no qemu-system-aarch64")
def test_powers_off_at_the_power_button_of_virt() -> None:
    with booted("qemu-system-aarch64", "virt") as guest:
        guest.wait_for_shell()
        press_power_button(guest)


def press_power_button(guest: Guest) -> None:
    guest.command("system_powerdown")
    assert "\nvmspawn-guest: power button pressed, powering off\n" in guest.drain()
    assert guest.process.returncode == 0


def test_reacts_to_a_power_button_that_appears_later(qemu: str) -> None:
    with booted(qemu) as guest:
        guest.wait_for_shell()
        guest.run("rmmod button && modprobe button && until pidof dd; do usleep 10000; done")
        press_power_button(guest)


def test_reboots_at_ctrl_alt_del(qemu: str) -> None:
    with booted(qemu) as guest:
        guest.wait_for_shell()
        guest.command("send-key", keys=[{"type": "qcode", "data": key} for key in ("ctrl", "alt", "delete")])
        assert "\nvmspawn-guest: ctrl-alt-del, rebooting\n" in guest.drain()


@pytest.mark.parametrize(("command", "line"), [("poweroff", "powering off"), ("reboot", "rebooting")])
def test_powers_off_and_reboots_by_command(qemu: str, command: str, line: str) -> None:
    with booted(qemu) as guest:
        guest.wait_for_shell()
        guest.type(f"{command}\n")
        assert line in guest.drain()
        assert guest.process.returncode == 0


def test_uses_the_console_that_the_kernel_arguments_name(qemu: str) -> None:
    options = ("-device", "virtio-serial-pci", "-device", "virtconsole,chardev=console")
    with booted(qemu, "q35", *options, console="hvc0", arguments="systemd.tty.term.hvc0=linux") as guest:
        guest.wait_for_shell()
        assert guest.run("tty; echo $TERM") == "/dev/hvc0\nlinux\n"
        # A virtio console loses queued output when the machine ends, so only wait for the end.
        guest.command("system_powerdown")
        guest.drain()
        assert guest.process.returncode == 0


def test_powers_off_without_a_console(qemu: str) -> None:
    with booted(qemu, console="hvc0") as guest:
        deadline = time.monotonic() + BOOT_SECONDS
        while not guest.has_ended(seconds=0.5):
            assert time.monotonic() < deadline
            # QEMU may end before it answers
            with suppress(OSError, ValueError):
                guest.command("system_powerdown")
