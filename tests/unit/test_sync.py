# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests that the blocking library equals the asynchronous one, also in threads, after forks and at interruptions."""

import asyncio
import concurrent.futures
import gc
import inspect
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest

import vmspawn
import vmspawn.sync
from tools import make_sync
from vmspawn.api import blocking
from vmspawn.api.blocking import Blocking, BlockingContext, Call, call, finish


def test_the_module_is_up_to_date() -> None:
    assert make_sync.TARGET.read_text() == make_sync.make(), "run: python tools/make_sync.py"


@pytest.mark.parametrize("name", sorted(make_sync.WRAPPED))
def test_a_blocking_class_has_the_members_of_the_asynchronous_class(name: str) -> None:
    hidden = make_sync.HIDDEN.get(name, set())
    theirs = {each for each in dir(getattr(vmspawn, name)) if not each.startswith("_")} - hidden
    assert theirs == {each for each in dir(getattr(vmspawn.sync, name)) if not each.startswith("_")}
    for member in theirs:
        if callable(expected := getattr(getattr(vmspawn, name), member)):
            found = getattr(getattr(vmspawn.sync, name), member)
            assert list(inspect.signature(found).parameters) == list(inspect.signature(expected).parameters)


def test_a_blocking_command_has_the_members_of_the_asynchronous_command() -> None:
    theirs = {name for name in dir(vmspawn.Execution) if not name.startswith("_")} - {"open"}
    ours = {name for name in dir(vmspawn.sync.Execution) if not name.startswith("_")}
    assert ours == theirs | {"stdin", "stdout", "stderr", "status"}
    for name in theirs:
        found, expected = getattr(vmspawn.sync.Execution, name), getattr(vmspawn.Execution, name)
        assert list(inspect.signature(found).parameters) == list(inspect.signature(expected).parameters)
        assert inspect.getdoc(found) == inspect.getdoc(expected)


def test_calls_of_many_threads_share_one_loop() -> None:
    loops = []

    async def work(number: int) -> int:
        loops.append(asyncio.get_running_loop())
        await asyncio.sleep(0)
        return number

    results: list[int] = []
    threads = [threading.Thread(target=lambda n=n: results.append(call(work(n)))) for n in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == list(range(20))
    assert len(set(loops)) == 1


def interrupted_by(started: threading.Event) -> threading.Thread:
    """Start a thread that interrupts the main thread, as Ctrl-C does, when the main thread waits."""

    def interrupt() -> None:
        started.wait()
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    return thread


def test_an_interrupted_call_is_cancelled_and_cleans_up_first() -> None:
    started = threading.Event()
    done: list[str] = []

    async def work() -> None:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            done.append("clean")

    thread = interrupted_by(started)
    with pytest.raises(KeyboardInterrupt):
        call(work())
    assert done == ["clean"]
    thread.join()


@pytest.fixture
def no_garbage_collection() -> Iterator[None]:
    """Collect no garbage during a test: Python ignores an interruption that comes during the collection."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("run", [call, finish])
@pytest.mark.usefixtures("no_garbage_collection")
@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
def test_an_interruption_between_any_two_instructions_leaves_no_lock_behind(run: Callable[..., object]) -> None:
    """The interruption comes before the nth instruction of this thread: n is increased until the call ends first."""
    count = left = 0
    begun: list[int] = []
    ended: list[int] = []

    async def work(number: int) -> None:
        begun.append(number)
        try:
            await asyncio.sleep(0.001)
        finally:
            ended.append(number)

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal left
        frame.f_trace_opcodes = True
        left -= event == "opcode"
        if left < 0:
            sys.settrace(None)
            raise KeyboardInterrupt
        return trace

    while True:
        left = count
        started = time.monotonic()
        sys.settrace(trace)
        try:
            run(work(count))
            break
        except KeyboardInterrupt:
            count += 1
        finally:
            sys.settrace(None)
        assert time.monotonic() - started < 10.0, f"interrupted before instruction {count}"
    assert count > 50
    # A coroutine that has begun has ended by now, and the next call works.
    call(asyncio.sleep(0))
    assert begun == ended
    # Interrupted calls leave event loops that nobody has closed. Their warnings belong to this test.
    gc.collect()


def test_a_cancelled_call_is_done_and_has_no_result() -> None:
    started = threading.Event()

    async def work() -> None:
        started.set()
        await asyncio.Event().wait()

    running = Call(work()).start()
    started.wait()
    running.cancel()
    assert running.is_done
    with pytest.raises(concurrent.futures.CancelledError):
        running.result()


def test_a_call_that_is_cancelled_before_its_start_never_starts() -> None:
    started: list[int] = []

    async def work() -> None:
        started.append(1)

    running = Call(work())
    running.cancel()
    assert running.start().is_done
    assert not started


def test_an_interruption_waits_for_the_end_of_a_machine() -> None:
    started = threading.Event()
    go_on = threading.Event()
    done: list[str] = []

    async def work() -> None:
        started.set()
        await asyncio.to_thread(go_on.wait)
        done.append("ended")

    def interrupt() -> None:
        started.wait()
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        go_on.set()

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        finish(work())
    assert done == ["ended"]
    thread.join()


def test_a_call_on_the_loop_itself_is_refused() -> None:
    async def nothing() -> None:
        pass

    async def work() -> None:
        call(nothing())

    with pytest.raises(vmspawn.UsageError, match="would block it for ever"):
        call(work())


async def test_a_call_works_in_a_thread_that_runs_an_event_loop() -> None:
    """A notebook is an example."""

    async def work() -> int:
        return 5

    assert call(work()) == 5


def in_child(check: object) -> int:
    """Run a function in a child of fork(2); returns its exit status."""
    assert callable(check)
    pid = os.fork()
    if not pid:
        status = 1
        try:
            check()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")
def test_a_forked_child_has_its_own_loop_and_cannot_use_its_parents_machines() -> None:
    async def thread() -> str:
        return threading.current_thread().name

    inherited = Blocking(vmspawn.Machine(guest="builtin", name="mine"))
    parents = blocking.background()
    assert call(thread()) == "vmspawn"

    def child() -> None:
        assert call(thread()) == "vmspawn"
        assert blocking.background() is not parents
        with pytest.raises(
            vmspawn.NotConnected, match=rf"<Machine 'mine', not started> belongs to process {os.getppid()}"
        ):
            inherited._read(lambda inner: inner.name)

    assert in_child(child) == 0
    assert call(thread()) == "vmspawn"
    assert blocking.background() is parents


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")
def test_a_child_that_leaves_a_with_block_ends_nothing_of_its_parents() -> None:
    left: list[int] = []

    class Manager:
        async def __aenter__(self) -> str:
            return "inside"

        async def __aexit__(self, *_: object) -> None:
            left.append(os.getpid())

    def child() -> None:
        context.__exit__(None, None, None)
        assert not left

    context = BlockingContext(Manager(), str)
    with context as inside:
        assert inside == "inside"
        assert in_child(child) == 0
    assert left == [os.getpid()]


def test_forks_while_threads_call_do_not_hang() -> None:
    stop = threading.Event()

    async def nothing() -> None:
        pass

    def busy() -> None:
        while not stop.is_set():
            call(nothing())

    thread = threading.Thread(target=busy)
    thread.start()
    try:
        deadline = time.monotonic() + 60
        for _ in range(20):
            assert in_child(lambda: call(nothing())) == 0
            assert time.monotonic() < deadline
    finally:
        stop.set()
        thread.join()
