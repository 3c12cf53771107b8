# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests the library with a booted guest: typing on the console, reading the console, and commands."""

import threading
from collections.abc import Callable

import pytest

import vmspawn
import vmspawn.sync

DEADLINE = 60.0


def test_a_started_and_a_connected_machine_type_on_the_console_and_read_it(vm: vmspawn.sync.Machine) -> None:
    ours = vm.console
    with vmspawn.sync.connect(vm.name) as connected:
        theirs = connected.console
        theirs.expect("vmspawn-guest: ready", timeout=DEADLINE)
        assert theirs.before[-500:] == ours.before[-500:]
        theirs.send_line("echo $((6 * 7)) is the answer")
        for console in (ours, theirs):
            found = console.expect(r"\n(\d+) is the answer\n", timeout=DEADLINE)
            assert found[1] == "42"
        for machine in (vm, connected):
            with machine.execute(["sh", "-c", "cat; sleep 100"]) as command:
                assert command.stdin
                assert command.stdout
                command.stdin.write(b"one\ntwo\n")
                assert command.stdout.readline() == b"one\n"
                assert next(iter(command.stdout)) == b"two\n"
                assert repr(command) == "<Execution, running>"
                command.stdin.close()
                command.terminate()
                assert command.wait() == command.status == 128 + 15
            assert machine.run("cat; echo $A >&2; exit 3", input="hi", env={"A": "b"}) == vmspawn.Completed(
                3, "hi", "b\n"
            )
        ending = threading.Timer(0.1, vm.power_off)
        ending.start()
        with pytest.raises(vmspawn.MachineEnded) as caught:
            theirs.expect("login: ", timeout=DEADLINE)
        ending.join()
        assert "42 is the answer" in caught.value.__notes__[-1]


async def test_commands_have_streams_on_the_loop_of_the_test(async_vm: vmspawn.Machine) -> None:
    async with await async_vm.execute(["cat"]) as command:
        assert repr(command) == "<Execution, running>"
        assert command.stdin is not None
        assert command.stdout is not None
        command.stdin.write(b"one\n")
        assert await command.stdout.readline() == b"one\n"
        assert await command.communicate(b"two") == (b"two", b"")
        assert await command.wait() == 0


def test_a_factory_s_machine_can_be_a_copy_of_a_snapshot(
    vm: vmspawn.sync.Machine, vmspawn_factory: Callable[..., vmspawn.sync.Machine]
) -> None:
    assert vm.config.warm
    vm.run("echo kept > /note", check=True)
    snapshot = vm.snapshot()
    try:
        with vmspawn_factory(snapshot=snapshot) as copy:
            assert copy.run("cat /note").stdout == "kept\n"
            copy.run("rm /note", check=True)
        with vmspawn_factory(snapshot=snapshot.name, console="headless") as copy:
            assert copy.run("cat /note").stdout == "kept\n"
    finally:
        snapshot.remove()
    with pytest.raises(pytest.fail.Exception, match="unexpected keyword argument 'ram'"):
        vmspawn_factory(snapshot=snapshot, ram="1G")
