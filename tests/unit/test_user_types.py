# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests that mypy accepts a correct program of a user, and finds the mistakes in a wrong one."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

PROGRAM = """
import asyncio
from collections.abc import Callable
from pathlib import Path

import vmspawn
import vmspawn.sync


async def main() -> None:
    async with vmspawn.Machine(guest="builtin", ram="512M", extra_disks=[Path("x.raw")]) as machine:
        attached = await machine.attach("data.raw", bus="nvme", read_only=True)
        print(attached.by_id)
        await machine.attach(5)  # error: arg-type
        await machine.attach("data.raw", bus="floppy")  # error: typeddict-item|arg-type
        await machine.attach("data.raw", buss="nvme")  # error: call-arg
        found = await machine.console.expect("login: ", timeout=5)
        print(found[1].upper())
        event = await machine.events.wait("STOP", where={"device": "x"}, since=machine.events.mark)
        print(event.nam)  # error: attr-defined
        async with machine.qmp() as qmp:
            await qmp.execute("stop", ["x"])  # error: arg-type
        async with machine.events() as events:
            async for each in events:
                print(each.name.upper())
        done = await machine.run("true", text=False)
        done.stdout.encode()  # error: attr-defined
        vmspawn.Machine(ram=0.5)  # error: arg-type
        vmspawn.Machine(imge="x")  # error: call-arg
        vmspawn.Machine(machine_type="i440fx")  # error: arg-type
        print(vmspawn.Nothing)  # error: attr-defined


def test_it(vm: vmspawn.sync.Machine, vmspawn_factory: Callable[..., vmspawn.sync.Machine]) -> None:
    status: str = vm.status()
    size: str = vm.resize("data", "96M")  # error: assignment
    print(status, size, vm.run("true").stdout.upper(), vm.events.wait("STOP").name.upper())
    with vmspawn.sync.connect("demo") as machine, machine.events() as events:
        print(next(events).name.upper(), machine.console.before.upper())
        print(vm.console.nothing)  # error: attr-defined


asyncio.run(main())
"""


def expected_errors() -> dict[int, list[str]]:
    """Return the codes that mypy may have for each wrong line, by the line's number."""
    marks = {number: re.search(r"# error: (\S+)$", line) for number, line in enumerate(PROGRAM.splitlines(), 1)}
    return {number: mark[1].split("|") for number, mark in marks.items() if mark}


def test_right_uses_pass_and_wrong_ones_are_found(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    command = [sys.executable, "-m", "mypy", "--strict", f"--cache-dir={ROOT / '.cache' / 'mypy-user'}", str(program)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=110)
    found = {int(line): code for line, code in re.findall(r"program\.py:(\d+): error: .*\[([a-z-]+)\]", done.stdout)}
    expected = expected_errors()
    assert set(found) == set(expected), done.stdout
    assert all(found[number] in codes for number, codes in expected.items()), done.stdout
