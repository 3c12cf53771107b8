# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests the pytest plugin in separate runs of pytest. For speed, the machines boot nothing but their firmware."""

import os
import re
import select
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import DEADLINE, background
from tests.conftest import MIB, make_raw
from tests.qemu.qmp_fixtures import wait_until
from tests.survivors import wait_until_dead
from vmspawn import sync
from vmspawn.cache import cache_directory
from vmspawn.host import runtime

pytest_plugins = ["pytester"]


@pytest.fixture
def project(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, qemu: str) -> pytest.Pytester:
    """Make a project whose machines boot nothing. They use this run's cache; pytester replaces the home directory."""
    monkeypatch.setenv("VMSPAWN_CACHE_DIR", CACHE)
    pytester.makeini("[pytest]\nasyncio_default_fixture_loop_scope = function\nasyncio_mode = strict\n")
    pytester.makeconftest(
        """
        import os
        import pytest

        def pytest_collection_modifyitems(items):
            for number, item in enumerate(items):
                # The test's own marker takes precedence over this one.
                item.add_marker(pytest.mark.vm(image=make(f"boot{number}.raw"), ram="64M", console="headless"))

        def make(name):
            with open(name, "ab") as image:
                image.truncate(1 << 20)
            return os.path.abspath(name)
        """
    )
    return pytester


CACHE = cache_directory()


def machines() -> set[str]:
    root = Path(runtime.runtime_root())
    return set(os.listdir(root)) if root.exists() else set()


def run(project: pytest.Pytester, *arguments: str) -> pytest.RunResult:
    before = machines()
    done = project.runpytest_subprocess("-p", "no:cacheprovider", *arguments, timeout=100)
    assert machines() == before
    return done


def test_the_import_of_the_plugin_loads_no_further_modules() -> None:
    script = (
        "import sys, pytest; before = set(sys.modules); import vmspawn.pytest_plugin; print(*set(sys.modules) - before)"
    )
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert set(done.stdout.split()) == {"vmspawn", "vmspawn.pytest_plugin"}


def test_each_test_and_each_call_of_the_factory_has_its_own_machine(project: pytest.Pytester) -> None:
    project.makepyfile(
        """
        import pytest
        names = []

        def test_one(vm):
            assert vm.status() == "running"
            names.append(vm.name)

        @pytest.mark.vm(disks=["8M", "twelve.raw"], cpus=2)
        def test_two(vm):
            names.append(vm.name)
            assert len(set(names)) == 2
            assert vm.config.cpus == 2
            disks = {each.disk.name: each.size for each in vm.disks()}
            assert (disks["disk0"], disks["twelve.raw"]) == (8 << 20, 12 << 20)

        @pytest.fixture(scope="module")
        def two(vmspawn_factory):
            def make(image):
                return vmspawn_factory(image=image, ram="64M", console="headless")

            with make("one.raw") as first, make("two.raw") as second:
                yield first, second

        def test_three(two, tmp_path):
            first, second = two
            assert first.name != second.name
            assert first.status() == second.status() == "running"
        """
    )
    make_raw(project.path / "twelve.raw", 12 * MIB)
    for name in ("one.raw", "two.raw"):
        make_raw(project.path / name, MIB)
    run(project).assert_outcomes(passed=3)


def test_an_asynchronous_test_uses_the_machine_from_its_own_loop(project: pytest.Pytester) -> None:
    project.makepyfile(
        """
        import asyncio
        import pytest, vmspawn

        @pytest.mark.asyncio
        async def test_it(async_vm, tmp_path):
            assert await async_vm.status() == "running"
            async with async_vm.events() as events:
                mark = async_vm.events.mark
                await async_vm.pause()
                async for event in events:
                    assert event.name == "STOP"
                    break
            assert (await async_vm.events.wait("STOP", since=mark)).name == "STOP"
            async with async_vm.qmp() as qmp:
                await qmp.execute("cont")
                with pytest.raises(vmspawn.QmpError):
                    await qmp.execute("nonsense")
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(async_vm.console.expect("never", timeout=None), 0.01)
            assert async_vm.console.text == ""
            assert async_vm.name.startswith("test_it-")
        """
    )
    run(project).assert_outcomes(passed=1)


def test_the_report_of_a_failure_describes_the_machine(project: pytest.Pytester) -> None:
    project.makepyfile(
        """
        import pytest

        @pytest.mark.vm(disks=["8M"], qemu_arguments=["-global", "nothing.size=1"])
        def test_it(vm):
            vm.pause()
            vm.events.wait("STOP", since=0)
            vm.events.wait("NEVER", timeout=0)

        @pytest.mark.asyncio
        async def test_async(async_vm):
            await async_vm.detach("nobody")
        """
    )
    done = run(project)
    done.assert_outcomes(failed=2)
    done.stdout.fnmatch_lines(
        [
            '>*vm.events.wait("NEVER", timeout=0)',
            "E*vmspawn.errors.Timeout: NEVER did not come within 0 s",
            "E*the last events:",
            "E*STOP",
            "*- vm test_it -*",
            "name *test_it-*: paused",
            "hardware  q35, 1 CPU, 64 MiB",
            "QMP log *.qmp.log",
            "*- vm test_it: console -*",
            "*- vm test_it: events -*",
            " *StorageAttached name=disk0",
            "*:*:*.*  STOP",
            "*- vm test_it: disks -*",
            "disk0 *virtio-blk *raw *8 MiB *attached *",
            "*- vm test_it: QEMU's standard error -*",
            "*warning: global nothing.size has invalid class name*",
        ]
    )
    done.stdout.fnmatch_lines([">*await async_vm.detach*", "E*NoSuchStorage: there is no disk named nobody"])
    # The tracebacks have only lines of the tests.
    assert not re.search(r"(blocking|elsewhere|attach|context)\.py:\d", done.stdout.str())
    log = re.search(r"QMP log +(\S+)", done.stdout.str())
    assert log
    assert "query-named-block-nodes" in Path(log[1]).read_text()


def test_a_test_that_leaves_objects_in_qemu_fails(project: pytest.Pytester) -> None:
    project.makepyfile(
        """
        def test_it(vm):
            with vm.qmp() as qmp:
                qmp.execute("blockdev-add", {"driver": "null-co", "node-name": "mine"})
        """
    )
    done = run(project)
    done.assert_outcomes(passed=1, errors=1)
    done.stdout.fnmatch_lines(["the test left behind: block node mine"])


def test_mistakes_are_reported_without_a_traceback(project: pytest.Pytester) -> None:
    project.makepyfile(
        """
        import pytest

        @pytest.mark.vm(ram="much")
        def test_one(vm): pass

        @pytest.mark.vm(rom="64M")
        def test_two(vm): pass

        @pytest.mark.vm(qemu="/nowhere/qemu")
        def test_three(vm): pass

        @pytest.mark.vm(qemu_arguments=["-nonsense"])
        def test_four(vm): pass
        """
    )
    done = run(project)
    done.assert_outcomes(errors=4)
    done.stdout.fnmatch_lines(
        [
            "ram='much' is not a size",
            "*did you mean 'ram'?",
            "cannot use QEMU /nowhere/qemu: *",
            "*-nonsense: invalid option*",
        ]
    )
    assert "Traceback" not in done.stdout.str()
    assert "During handling" not in done.stdout.str()


def test_without_a_qemu_tests_are_skipped_unless_it_is_required(
    project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    project.makepyfile("def test_it(vm): pass")
    monkeypatch.setenv("PATH", str(project.path))
    done = run(project, "-rs")
    done.assert_outcomes(skipped=1)
    done.stdout.fnmatch_lines(["SKIPPED*no QEMU*"])
    run(project, "--vm-required").assert_outcomes(errors=1)


def test_each_machine_type_and_qemu_is_a_parameter(project: pytest.Pytester, qemu: str) -> None:
    project.makepyfile(
        """
        import pytest

        def test_it(vm):
            assert vm.config.machine_type in ("q35", "pc")

        @pytest.mark.vm(machine_type="q35")
        def test_marked(vm):
            assert vm.config.machine_type == "q35"
        """
    )
    done = run(project, "-v", "--vm-machine-type=q35", "--vm-machine-type=pc", f"--vm-qemu={qemu}")
    done.assert_outcomes(passed=3)
    done.stdout.fnmatch_lines(["*::test_it?q35? PASSED*", "*::test_it?pc? PASSED*", "*::test_marked PASSED*"])


def test_a_test_runs_with_each_qemu(project: pytest.Pytester) -> None:
    project.makepyfile("def test_it(vm): pass")
    done = run(project, "--collect-only", "-q", "--vm-qemu=/usr/bin/one", "--vm-qemu=/usr/bin/two")
    done.stdout.fnmatch_lines(["*::test_it?/usr/bin/one?", "*::test_it?/usr/bin/two?"])


def test_parallel_workers_run_machines_and_report_failures(project: pytest.Pytester) -> None:
    project.makepyfile(
        """
        import pytest

        @pytest.mark.parametrize("number", range(6))
        def test_it(vm, number):
            vm.pause()
            assert number != 3
        """
    )
    done = run(project, "-n", "2")
    done.assert_outcomes(passed=5, failed=1)
    done.stdout.fnmatch_lines(["*- vm test_it-3 -*", "*- vm test_it-3: events -*", "*  STOP"])
    refused = run(project, "-n", "2", "--vm-console")
    assert refused.ret == pytest.ExitCode.USAGE_ERROR
    refused.stderr.fnmatch_lines(["*--vm-console does not work with -n*"])


@pytest.mark.parametrize("workers", [(), ("-n", "1")], ids=["alone", "xdist"])
def test_the_machine_of_a_failed_test_is_kept_if_asked(project: pytest.Pytester, workers: tuple[str, ...]) -> None:
    project.makepyfile(
        """
        def test_good(vm): pass

        def test_bad(vm):
            assert vm.status() == "gone"
        """
    )
    before = machines()
    done = project.runpytest_subprocess("--vm-keep", *workers, timeout=100)
    (name,) = machines() - before
    try:
        done.assert_outcomes(passed=1, failed=1)
        done.stdout.fnmatch_lines([f"vmctl console {name} *vmctl terminate {name}"])
        with sync.connect(name) as machine:
            assert machine.status() == "running"
    finally:
        command = [sys.executable, "-m", "vmspawn.cli.ctl", "terminate", name]
        subprocess.run(command, check=True, capture_output=True, timeout=60)


def test_the_help_lists_the_options_of_the_plugin(project: pytest.Pytester) -> None:
    done = project.runpytest_subprocess("--help", timeout=60)
    done.stdout.fnmatch_lines(["virtual machines (vmspawn):", "*--vm-qemu=PATH*", "*--vm-required*"])
    assert done.ret == pytest.ExitCode.OK


def test_machines_die_with_a_run_that_is_killed(project: pytest.Pytester) -> None:
    project.makepyfile(
        """
        import os

        def test_it(vm):
            with open("fifo", "w") as fifo:
                fifo.write(str(vm.pid))
            vm.wait()
        """
    )
    fifo = project.path / "fifo"
    os.mkfifo(fifo)
    before = machines()
    with background([sys.executable, "-m", "pytest", "-p", "no:cacheprovider"], stdout=subprocess.DEVNULL):
        pid = int(read_fifo(fifo))
    wait_until_dead(pid)
    # A process of the machine removes the machine's directory when QEMU is gone.
    wait_until(lambda: not machines() - before, "the removal of the machine's directory")


def read_fifo(path: Path) -> bytes:
    """Read what a program writes into a FIFO at once."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        assert select.select([fd], [], [], DEADLINE)[0], f"nothing was written to {path} within {DEADLINE:g} s"
        return os.read(fd, 4096)
    finally:
        os.close(fd)
