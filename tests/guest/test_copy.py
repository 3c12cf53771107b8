# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests `vmctl copy`, `machine.copy_to` and `machine.copy_from` with the built-in guest."""

from __future__ import annotations

import asyncio
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import vmspawn
from tests.commands import DEADLINE, VMCTL, background, one_line, run_example, vmctl
from tests.terminal import terminal
from tests.unit.test_archive import MIB, look, make_sparse, tree
from vmspawn.errors import CopyFailed
from vmspawn.sync import Machine

__all__ = ["tree"]


@pytest.fixture(scope="module")
def machine(vmspawn_factory: Callable[..., Machine]) -> Iterator[Machine]:
    """Start one machine for all tests."""
    with vmspawn_factory() as machine:
        yield machine


def shell(machine: Machine, command: str) -> str:
    """Run a command in the guest, which must succeed, and return its output."""
    return machine.run(command, check=True).stdout


def copy(*arguments: str) -> None:
    done = vmctl("copy", *arguments)
    assert (done.returncode, done.stderr) == (0, "")


def left_behind(machine: Machine) -> str:
    return shell(machine, "find /tmp /root -name '.vmspawn-copy-*'")


def test_a_tree_is_copied_to_the_guest_and_back_unchanged(machine: Machine, tree: Path, tmp_path: Path) -> None:
    os.utime(tree / "empty", (0, 0))
    copy(str(tree), f"{machine.name}:/tmp/there")
    assert (
        shell(machine, "cat /tmp/there/sub/hard; stat -c '%a %Y %U' /tmp/there/locked")
        == "content\n555 500000000 root\n"
    )
    copy(f"{machine.name}:/tmp/there", str(tmp_path / "back"))
    # busybox does not set the times of symbolic links.
    expected = {name: row[:1] + row[2:] if "link" in name or "far" in name else row for name, row in look(tree).items()}
    found = look(tmp_path / "back").items()
    assert {name: row[:1] + row[2:] if "link" in name or "far" in name else row for name, row in found} == expected
    assert left_behind(machine) == ""
    assert not list(tmp_path.glob(".vmspawn*"))


def test_the_target_is_a_new_name_a_directory_or_a_file_to_replace(machine: Machine, tmp_path: Path) -> None:
    shell(machine, "rm -rf /tmp/where; mkdir /tmp/where")
    for name in ("one", "two"):
        (tmp_path / name).write_text(name)
    copy(str(tmp_path / "one"), f"{machine.name}:/tmp/where/new name")
    copy(str(tmp_path / "one"), str(tmp_path / "two"), f"{machine.name}:/tmp/where")
    copy(str(tmp_path / "two"), f"{machine.name}:/tmp/where/one")
    copy(str(tmp_path / "one"), f"{machine.name}:-in-home")
    assert shell(machine, "cd /tmp/where; ls; cat one two; cat /root/-in-home") == "new name\none\ntwo\ntwotwoone"
    (tmp_path / "into").mkdir()
    copy(f"{machine.name}:/tmp/where/one", f"{machine.name}:/tmp/where/two", str(tmp_path / "into"))
    copy(f"{machine.name}:-in-home", str(tmp_path / "into" / "renamed"))
    assert {path.name: path.read_text() for path in (tmp_path / "into").iterdir()} == {
        "one": "two",
        "two": "two",
        "renamed": "one",
    }


def test_copy_to_and_copy_from_work_as_in_machinectl(machine: Machine, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("alias")
    assert vmctl("copy-to", machine.name, str(tmp_path / "file"), "/tmp/alias").returncode == 0
    assert vmctl("copy-from", machine.name, "/tmp/alias", str(tmp_path / "back")).returncode == 0
    assert (tmp_path / "back").read_text() == "alias"


def test_a_directory_is_merged_into_one_of_the_guest(machine: Machine, tmp_path: Path) -> None:
    shell(
        machine,
        "rm -rf /tmp/merge; mkdir -p /tmp/merge/top/sub; echo old >/tmp/merge/top/old; echo x >/tmp/merge/top/a",
    )
    (tmp_path / "top" / "sub").mkdir(parents=True)
    (tmp_path / "top" / "a").write_text("new")
    (tmp_path / "top" / "sub" / ".hidden").write_text("hidden")
    copy(str(tmp_path / "top"), f"{machine.name}:/tmp/merge")
    assert shell(machine, "cd /tmp/merge/top; cat old a sub/.hidden") == "old\nnewhidden"


def test_holes_stay_holes_in_both_directions(machine: Machine, tmp_path: Path) -> None:
    path = make_sparse(tmp_path / "sparse")
    copy(str(path), f"{machine.name}:/tmp")
    assert int(shell(machine, "du -k /tmp/sparse").split()[0]) < 2048
    shell(machine, "echo changed | dd of=/tmp/sparse bs=1 seek=1000000 conv=notrunc")
    copy(f"{machine.name}:/tmp/sparse", str(tmp_path / "back"))
    with open(path, "r+b") as file:
        file.seek(1000000)
        file.write(b"changed\n")
    assert (tmp_path / "back").stat().st_blocks * 512 < 2 * MIB
    assert (tmp_path / "back").read_bytes() == path.read_bytes()
    assert shell(machine, "stat -c %Y /tmp/sparse; rm /tmp/sparse")


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("{host}/none", "{guest}:/tmp"), "cannot read '{host}/none': No such file"),
        (("{host}/file", "{guest}:/no/such/place"), "there is no directory /no/such"),
        (("{host}/file", "{guest}:/tmp/none/"), "/tmp/none is not a directory"),
        (("{host}/file", "{host}/other", "{guest}:/tmp/none"), "/tmp/none is not a directory"),
        (("{guest}:/none", "{host}"), "cannot copy '/none': No such file or directory"),
        (("{guest}:/etc/passwd", "{host}/none/"), "is not a directory"),
        (("{guest}:/dev/null", "{host}"), "'null' is a device"),
        (("{guest}:/dev/fd", "{host}"), "'fd' is a symbolic link, to '/proc/self/fd'"),
        (("{host}/file", "{host}/other"), "one side has to be in a guest"),
        (("{guest}:/a", "{guest}:/b"), "one side has to be in a guest"),
        (("{host}/file", "{guest}:"), "is empty"),
        (("{guest}:", "{host}"), "is empty"),
        (("{host}", "{guest}:/etc/passwd"), "cannot replace /etc/passwd: only one of the two is a directory"),
        (("{host}/tmp", "{guest}:/"), "cannot replace /tmp: only one of the two is a directory"),
        (("{guest}:/", "{host}"), "no name to copy it under"),
    ],
)
def test_an_impossible_copy_is_refused_with_the_reason(
    machine: Machine, tmp_path: Path, arguments: tuple[str, ...], why: str
) -> None:
    for name in ("file", "other", "tmp"):
        (tmp_path / name).write_text(name)
    values = {"host": str(tmp_path), "guest": machine.name}
    done = vmctl("copy", *(each.format(**values) for each in arguments))
    assert done.returncode in (1, 2)
    assert why.format(**values) in one_line(done, "vmctl")
    assert {path.name for path in tmp_path.iterdir()} == {"file", "other", "tmp"}
    assert left_behind(machine) == ""


def test_a_full_guest_keeps_the_old_file(machine: Machine, tmp_path: Path) -> None:
    shell(machine, "mkdir -p /tmp/small; mount -t tmpfs -o size=1M tmpfs /tmp/small; echo old >/tmp/small/large")
    (tmp_path / "large").write_bytes(os.urandom(8 * MIB))
    done = vmctl("copy", str(tmp_path / "large"), f"{machine.name}:/tmp/small/large")
    assert done.returncode == 1
    assert "No space left" in one_line(done, "vmctl")
    assert shell(machine, "ls -A /tmp/small; cat /tmp/small/large; umount /tmp/small") == "large\nold\n"


def test_a_write_error_on_the_host_keeps_the_old_file(machine: Machine, tmp_path: Path) -> None:
    shell(machine, "dd if=/dev/urandom of=/tmp/two bs=1M count=2 status=none")
    (tmp_path / "two").write_text("old")
    script = "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))\n"
    script += "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    script += "sys.argv[0] = 'vmctl'; runpy.run_module('vmspawn.cli.ctl', run_name='__main__')"
    command = [sys.executable, "-c", script, "copy", f"{machine.name}:/tmp/two", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE, check=False)
    assert done.returncode == 1
    assert "cannot write 'two': File too large" in one_line(done, "vmctl")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"two": "old"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_copy_that_is_interrupted_leaves_nothing(machine: Machine, tmp_path: Path, number: signal.Signals) -> None:
    """The file is larger than the guest's /tmp. A command in the guest reports that the copy has begun."""
    with open(tmp_path / "large", "wb") as file:
        file.write(os.urandom(MIB) * 200)
    command = [*VMCTL, "copy", str(tmp_path / "large"), f"{machine.name}:/tmp/half"]
    watch = "until find /tmp -name '.vmspawn-copy-*' | grep .; do sleep 0.01; done"
    with background([*VMCTL, "exec", machine.name, "sh", "-c", watch], stdout=subprocess.PIPE) as begun:
        assert begun.stdout is not None
        with background(command, stderr=subprocess.PIPE, text=True) as process:
            assert select.select([begun.stdout], [], [], DEADLINE)[0]
            process.send_signal(number)
            assert process.wait(DEADLINE) in (130, 143)
    assert left_behind(machine) == ""
    assert "half" not in shell(machine, "ls /tmp")


#: vmctl with a progress bar for quick copies too.
VMCTL_WITH_BAR = """
import runpy
from vmspawn.cli.ctl import progress_bar
progress_bar._DELAY = progress_bar._INTERVAL = 0.0
runpy.run_module("vmspawn.cli.ctl", run_name="__main__")
"""


def test_a_progress_bar_is_shown_on_a_terminal(machine: Machine, tmp_path: Path) -> None:
    with open(tmp_path / "large", "wb") as file:
        file.write(os.urandom(MIB) * 48)
    with terminal() as tty:
        command = [sys.executable, "-c", VMCTL_WITH_BAR]
        process = tty.start([*command, "copy", str(tmp_path / "large"), f"{machine.name}:/tmp/large"])
        tty.expect(rb"\[#*\.*\] +\d+% [\d.]+[KM] of 48M, [\d.]+[KM]/s")
        assert tty.wait(process) == 0
    assert shell(machine, "stat -c %s /tmp/large; rm /tmp/large") == f"{48 * MIB}\n"


async def test_the_library_copies_and_skips_special_files_on_request(machine: Machine, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("from a program")
    calls: list[tuple[int, int]] = []
    async with vmspawn.connect(machine.name) as connected:
        await connected.copy_to(tmp_path / "file", "/tmp/program", progress=lambda *call: calls.append(call))
        assert await connected.copy_from(["/tmp/program"], tmp_path / "back") == []
        with pytest.raises(CopyFailed, match="device"):
            await connected.copy_from("/dev/null", tmp_path)
        (left_out,) = await connected.copy_from("/dev/null", tmp_path, skip_special=True)
        assert "null" in left_out
    assert (tmp_path / "back").read_text() == "from a program"
    assert calls
    assert calls[-1][0] == calls[-1][1]


async def test_a_copy_that_is_cancelled_leaves_nothing(machine: Machine, tmp_path: Path) -> None:
    """The file is so large that the copy can be cancelled before it ends."""
    shell(machine, "rm -rf /tmp/slow; mkdir /tmp/slow; dd if=/dev/zero of=/tmp/slow/f bs=1M count=50 status=none")
    started = asyncio.Event()
    async with vmspawn.connect(machine.name) as connected:
        copying = asyncio.create_task(
            connected.copy_from("/tmp/slow", tmp_path / "slow", progress=lambda *_: started.set())
        )
        async with asyncio.timeout(DEADLINE):
            await started.wait()
        copying.cancel()
        await asyncio.wait({copying})
        assert copying.cancelled()
    assert os.listdir(tmp_path) == []


def test_the_example_of_the_docs_works(machine: Machine, tmp_path: Path) -> None:
    done = run_example("copy.md", "copy", tmp_path, {"demo": machine.name})
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "kernel.log").read_text()
