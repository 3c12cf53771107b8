# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests a guest that keeps writing while its managers are killed at random moments."""

import asyncio
import contextlib
import json
import os
import random
import socket
import subprocess
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.commands import DEADLINE, vmctl, vmspawn
from tests.conftest import MIB, make_qcow2, make_raw
from tests.figures import figure, milliseconds
from tests.guest.writing import ask, records_written, start_writer, stop_writer, verify
from tests.machines import fresh_name, is_gone, links_of
from tests.qemu.qmp_fixtures import SCALE
from tests.shell import Shell
from tests.survivors import Survivor, survivor
from vmspawn.control.client import Client
from vmspawn.errors import VmspawnError
from vmspawn.host.runtime import CONSOLE

MACHINE = "io.vmspawn.Machine"

#: The number of times that a test kills the manager: 6 by default, 300 at a scale above 1, and 1000 at a scale of 10 or
#: more, as in `./dev soak`.
KILLS = 6 if SCALE <= 1 else 300 if SCALE < 10 else 1000

#: The maximum number of seconds from the start of an operation until the manager is killed. An attach takes 0.01 s, a
#: detach 0.1 s.
MOMENTS = {"attach": 0.02, "detach": 0.15, "replace": 0.02, "qmp": 0.05, "idle": 0.01}

BUSES = ("virtio-blk", "nvme", "virtio-scsi")


@pytest.fixture
def guest(qemu: str) -> Iterator[Survivor]:
    with survivor(fresh_name(), f"--qemu={qemu}", "--guest=builtin", "--console=headless") as running:
        yield running


@contextlib.asynccontextmanager
async def shell_of(guest: Survivor) -> AsyncIterator[Shell]:
    """Connect to the guest's console at its manager."""
    shell = await Shell.connect(os.path.join(guest.folder, CONSOLE))
    try:
        yield shell
    finally:
        shell.close()


class Work:
    """Operations of a client in a thread. The manager's death is not an error."""

    def __init__(self, guest: Survivor, choices: random.Random, folder: Path) -> None:
        self._guest = guest
        self._choices = choices
        self._folder = folder

    def begin(self) -> tuple[str, threading.Thread]:
        """Begin an operation that is possible now. Returns its name and its thread."""
        extra = [disk for disk in self._guest.disks() if disk["name"] != "log"]
        kinds = ["idle", "qmp"]
        kinds += ["attach"] * 2 if len(extra) < 4 else []
        kinds += ["detach", "replace"] if extra else []
        kind = self._choices.choice(kinds)
        chosen = self._choices.choice(extra) if extra else None
        thread = threading.Thread(target=self._run, args=(getattr(self, f"_{kind}"), extra, chosen))
        thread.start()
        return kind, thread

    def _run(self, work: Any, extra: list[dict[str, Any]], chosen: dict[str, Any] | None) -> None:
        with contextlib.suppress(VmspawnError, OSError), Client(self._guest.name) as client:
            work(client, extra, chosen)

    def _idle(self, client: Client, extra: list[dict[str, Any]], chosen: dict[str, Any]) -> None:
        client.call(f"{MACHINE}.Describe")

    def _attach(self, client: Client, extra: list[dict[str, Any]], chosen: dict[str, Any]) -> None:
        free = {f"extra{n}" for n in range(4)} - {disk["name"] for disk in extra}
        name = sorted(free)[0]
        wanted = {"name": name, "bus": self._choices.choice(BUSES)}
        self._call_with_image(client, "AttachStorage", f"{name}.a", wanted)

    def _detach(self, client: Client, extra: list[dict[str, Any]], chosen: dict[str, Any]) -> None:
        client.call(f"{MACHINE}.DetachStorage", {"name": chosen["name"]})

    def _replace(self, client: Client, extra: list[dict[str, Any]], chosen: dict[str, Any]) -> None:
        other = f"{chosen['name']}.{'b' if chosen['path'].endswith('.a') else 'a'}"
        self._call_with_image(client, "ReplaceStorage", other, {"name": chosen["name"]})

    def _call_with_image(self, client: Client, method: str, file: str, wanted: dict[str, Any]) -> None:
        path = str(self._folder / file)
        fd = os.open(path, os.O_RDWR)
        try:
            client.call(f"{MACHINE}.{method}", {"fileDescriptorIndex": 0, "path": path, **wanted}, fds=(fd,))
        finally:
            os.close(fd)

    def _qmp(self, client: Client, extra: list[dict[str, Any]], chosen: dict[str, Any]) -> None:
        """Run many QMP commands. They leave named descriptors and descriptor sets behind."""
        connected, _ = client.upgrade(f"{MACHINE}.AcquireQMP")
        connected.sendall(b'{"execute":"qmp_capabilities"}')
        fd = os.open(os.devnull, os.O_RDWR)
        try:
            for number in range(1000):
                socket.send_fds(connected, [b'{"execute":"getfd","arguments":{"fdname":"n%d"}}' % number], [fd])
                socket.send_fds(connected, [b'{"execute":"add-fd"}'], [fd])
                connected.sendall(b'{"execute":"query-block"}')
                if not connected.recv(1 << 20):
                    return
        finally:
            os.close(fd)


@pytest.mark.scaled
async def test_the_guest_loses_no_writes_when_its_managers_are_killed(guest: Survivor, tmp_path: Path) -> None:
    seed = random.randrange(1 << 32) if SCALE > 1 else 8
    choices = random.Random(seed)
    log = make_raw(tmp_path / "log", 64 * MIB)
    for n in range(4):
        make_raw(tmp_path / f"extra{n}.a", 8 * MIB)
        make_raw(tmp_path / f"extra{n}.b", 8 * MIB)
    async with shell_of(guest) as shell:
        count = await write_while_managers_die(guest, shell, choices, tmp_path, str(seed))
    assert (await asyncio.to_thread(vmctl, "terminate", guest.name)).returncode == 0
    assert await asyncio.to_thread(guest.manager.wait) == 0
    assert is_gone(guest.name)
    assert verify(log, count) == count


async def write_while_managers_die(
    guest: Survivor, shell: Shell, choices: random.Random, folder: Path, seed: str
) -> int:
    """Kill managers while the guest writes. Returns the number of records that the guest wrote."""
    done = await asyncio.to_thread(vmctl, "attach-disk", guest.name, str(folder / "log"))
    assert done.returncode == 0, done.stderr
    await start_writer(shell, "/dev/disk/by-id/virtio-log")
    work = Work(guest, choices, folder)
    seen = 0
    adoptions: list[float] = []
    for number in range(KILLS):
        kind, thread = await asyncio.to_thread(work.begin)
        # The moment must be random, so there is no event to wait for.
        await asyncio.sleep(choices.uniform(0, MOMENTS[kind]))
        await asyncio.to_thread(guest.kill_manager)
        await asyncio.to_thread(thread.join, 30)
        assert not thread.is_alive()
        begun = time.monotonic()
        await asyncio.to_thread(guest.adopt)
        adoptions.append(time.monotonic() - begun)
        await shell.reconnect(os.path.join(guest.folder, CONSOLE))
        where = f"kill {number} of seed {seed}, in {kind}: {guest.manager.output['stderr']}"
        await check(guest, shell, folder, where)
        async with asyncio.timeout(DEADLINE):
            while (written := await records_written(shell)) <= seen:
                pass
        seen = written
    count = await stop_writer(shell)
    figure("managers killed", KILLS)
    figure("time from the start of the next manager until it manages the machine", milliseconds(adoptions))
    figure("records that the guest wrote meanwhile, none lost", count)
    return count


async def check(guest: Survivor, shell: Shell, folder: Path, where: str) -> None:
    """Check that list-disks, the guest and QEMU agree on the disks, and that QEMU has no other objects."""
    disks = await asyncio.to_thread(settled, guest)
    for disk in disks:
        assert disk["state"] == "attached", where
    names = " ".join(sorted(disk["byId"].rpartition("/")[2] for disk in disks))
    # An NVMe disk has more names, with its namespace's number and identifier.
    seen = "$(ls /dev/disk/by-id | grep -v ^nvme-nvme | sed 's/_[0-9]*$//' | sort -u | xargs)"
    waiting = f'n=0; until [ "{seen}" = "{names}" ] || [ $((n += 1)) -gt 100 ]; do usleep 10000; done'
    assert await ask(shell, f"{waiting}; echo {seen}") == names, where
    found = await asyncio.to_thread(look, guest)
    # A raw image has two nodes.
    assert len(found["nodes"]) == 2 * len(disks), f"{where}: {found['nodes']} for {disks}"
    assert not [fdset for fdset in found["fdsets"] if fdset["fds"]], where
    assert sorted(files_of(guest.pid, folder)) == sorted(disk["path"] for disk in disks), where
    taken = sum(disk["bus"] != "virtio-scsi" for disk in disks)
    assert found["status"]["portsFree"] == found["status"]["ports"] - taken, where
    assert processes_of(guest.name) == {guest.pid, guest.manager.process.pid}, where


def settled(guest: Survivor) -> list[dict[str, Any]]:
    """Wait until all removals have ended, and return the disks."""
    for disk in guest.disks():
        if disk["state"] == "detaching":
            vmctl("detach-disk", guest.name, disk["name"])
    return guest.disks()


def look(guest: Survivor) -> dict[str, Any]:
    def ask(command: str, *arguments: str) -> Any:
        return json.loads(vmctl("qmp", guest.name, command, *arguments).stdout)

    return {
        "status": json.loads(vmctl("status", guest.name, "--json=short").stdout),
        "nodes": [node["node-name"] for node in ask("query-named-block-nodes", "flat=true")],
        "fdsets": ask("query-fdsets"),
    }


def files_of(pid: int, folder: Path) -> list[str]:
    """Return the files in the directory that a process has open, once for each descriptor."""
    return [link for link in links_of(pid) if os.path.dirname(link) == str(folder)]


def processes_of(name: str) -> set[int]:
    """Return the processes with a machine's name on their command line, except this process."""
    found = set()
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_bytes()
            if name.encode() in words and int(pid) != os.getpid():
                found.add(int(pid))
    return found


@pytest.mark.scaled
@pytest.mark.parametrize("transport", ["serial"] if SCALE <= 1 else ["serial", "virtio"])
async def test_output_printed_without_a_manager_is_shown_after_the_adoption(
    qemu: str, tmp_path: Path, transport: str
) -> None:
    """No process reads the console while the guest prints, so the guest reports the end of its output on a disk."""
    mark = make_raw(tmp_path / "mark", MIB)
    options = ("--guest=builtin", "--console=headless", f"--console-transport={transport}")
    with survivor(fresh_name(), f"--qemu={qemu}", f"--extra-drive={mark}", *options) as guest:
        async with shell_of(guest) as shell:
            for number in range(1 if SCALE <= 1 else 3):
                await shell.run(f"(sh -c '{_PRINT_ON_REQUEST}' {number} </dev/null &)")
                await asyncio.to_thread(guest.kill_manager)
                await asyncio.to_thread(let_print, guest, mark, b"over%d" % number)
                await asyncio.to_thread(guest.adopt)
                await shell.reconnect(os.path.join(guest.folder, CONSOLE))
                await shell.wait_for("".join((f"begin-{number}\n", *(f"{n} meanwhile\n" for n in range(1, 1001)))))
                assert "missing" not in shell.text
                await shell.run("echo and goes on")


@pytest.mark.soak
async def test_lost_output_is_reported(qemu: str, tmp_path: Path) -> None:
    """Twice, the guest prints more than is kept while it has no manager. It is not blocked."""
    mark = make_raw(tmp_path / "mark", MIB)
    options = ("--guest=builtin", "--console=headless", f"--extra-drive={mark}")
    with survivor(fresh_name(), f"--qemu={qemu}", *options) as guest:
        async with shell_of(guest) as shell:
            for number in range(2):
                await shell.run(f"(sh -c '{_PRINT_ON_REQUEST.replace('seq 1000', 'seq 90000')}' {number} </dev/null &)")
                await asyncio.to_thread(guest.kill_manager)
                await asyncio.to_thread(let_print, guest, mark, b"over%d" % number)
                await asyncio.to_thread(guest.adopt)
                await shell.reconnect(os.path.join(guest.folder, CONSOLE))
                await shell.wait_for(f"begin-{number}\n1 meanwhile\n")
                await shell.wait_for("while it had no manager, is missing")
                await shell.run("echo and goes on")


#: A script that waits for the word `go` on the disk, prints, and writes the word `over` with its argument to the disk.
_PRINT_ON_REQUEST = (
    'until dd if=/dev/vda bs=512 count=1 iflag=direct 2>/dev/null | grep -q "^go"; do usleep 10000; done; '
    "echo begin-$0; for n in $(seq 1000); do echo $n meanwhile; done; "
    "echo over$0 | dd of=/dev/vda bs=512 count=1 conv=sync,fsync 2>/dev/null"
)


def let_print(guest: Survivor, path: Path, content: bytes) -> None:
    """Write the word `go`, and wait until the guest has written `content`. Sends a QMP command between two looks."""
    with open(path, "r+b") as disk:
        disk.write(b"go".ljust(512, b"\0"))
    deadline = time.monotonic() + 60
    with guest.monitor() as monitor:
        while path.read_bytes()[: len(content)] != content:
            assert time.monotonic() < deadline, f"the guest did not write {content!r}"
            monitor.execute("query-blockstats")


@pytest.mark.scaled
@pytest.mark.parametrize("manager", ["alive", "dead"])
async def test_a_qcow2_image_is_consistent_after_qemu_is_killed(qemu: str, tmp_path: Path, manager: str) -> None:
    """The image has each record that the guest had synced and counted."""
    for _ in range(max(1, min(20, round(SCALE)))):
        image = make_qcow2(tmp_path / "log", 64 * MIB)
        with survivor(fresh_name(), f"--qemu={qemu}", "--guest=builtin", "--warm", "--console=headless") as guest:
            async with shell_of(guest) as shell:
                done = await asyncio.to_thread(vmctl, "attach-disk", guest.name, str(image), "--format=qcow2")
                assert done.returncode == 0, done.stderr
                await start_writer(shell, "/dev/disk/by-id/virtio-log")
                count = await records_written(shell)
                if manager == "dead":
                    await asyncio.to_thread(guest.kill_manager)
                guest.kill_qemu()
            if manager == "dead":
                done = await asyncio.to_thread(vmspawn, "--adopt", "-M", guest.name)
                assert (done.returncode, "has ended while it had no manager" in done.stderr) == (1, True)
            else:
                assert await asyncio.to_thread(guest.manager.wait) == 1
                assert "QEMU died of SIGKILL" in guest.manager.output["stderr"]
            assert is_gone(guest.name)
            assert processes_of(guest.name) == set()
        await asyncio.to_thread(check_qcow2, image, tmp_path / "log.raw", count)


def check_qcow2(image: Path, copy: Path, count: int) -> None:
    # Status 3 means leaked clusters, which waste space but lose no data; 2 would be corruption.
    assert subprocess.run(["qemu-img", "check", "-q", str(image)], check=False).returncode in (0, 3)
    subprocess.run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", str(image), str(copy)], check=True)
    assert verify(copy, count) >= count
