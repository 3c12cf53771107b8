# SPDX-License-Identifier: LGPL-2.1-or-later
"""Run the library's coroutines from blocking code: on one event loop, in a thread of its own.

The thread is started by the first call and ends with the process; machines that still run then are ended. A call that
is interrupted (Ctrl-C) is cancelled, and returns once it has cleaned up. A child of fork(2) has no part in its parent's
machines: its calls raise NotConnected, and it may make machines of its own.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import os
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import AbstractAsyncContextManager, AbstractContextManager, suppress
from types import TracebackType
from typing import Any, Generic, TypeVar

from ..errors import NotConnected, UsageError, VmspawnError

#: pytest leaves our calls out of its tracebacks.
__tracebackhide__ = True

_T = TypeVar("_T")
_Inner = TypeVar("_Inner")
_Wrapped = TypeVar("_Wrapped", covariant=True)

#: Seconds that a call which was interrupted has to clean up.
_CANCEL_TIMEOUT = 15.0

#: Seconds that the machines which still run have to end with the process.
_EXIT_TIMEOUT = 15.0


class _Background:
    """The thread with its event loop."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self._run, name="vmspawn", daemon=True)
        self.pid = os.getpid()
        #: What has to be ended with the process.
        self.open: set[Blocking[Any]] = set()
        self.thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()


_lock = threading.Lock()
_background: _Background | None = None
#: The parent's, in a child of fork(2). It must not be collected: that would close what belongs to the parent.
_abandoned: list[_Background] = []


def background() -> _Background:
    """The thread of this process."""
    global _background
    with _lock:
        if _background is None:
            _background = _Background()
        return _background


def _forget() -> None:
    """Forget the parent's thread, which the child of a fork does not have."""
    global _background
    if _background is not None:
        _abandoned.append(_background)
        _background = None
    _lock.release()


os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_forget)


class Call(Generic[_T]):
    """A coroutine that runs in the background."""

    def __init__(self, work: Coroutine[Any, Any, _T]) -> None:
        self._owner = background()
        if threading.current_thread() is self._owner.thread:
            work.close()
            raise UsageError(
                "a blocking call was made in the thread of vmspawn's event loop, which it would block for ever",
                hint="functions that are passed to wait() must not call vmspawn",
            )
        self._task: asyncio.Task[_T] | None = None
        self._cancelled = False
        self.future: concurrent.futures.Future[_T] = concurrent.futures.Future()
        self._owner.loop.call_soon_threadsafe(self._begin, work)

    def _begin(self, work: Coroutine[Any, Any, _T]) -> None:
        self._task = self._owner.loop.create_task(work)
        self._task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[_T]) -> None:
        if task.cancelled():
            self.future.cancel()
        elif error := task.exception():
            self.future.set_exception(error)
        else:
            self.future.set_result(task.result())

    def cancel(self) -> None:
        """Cancel the coroutine, and give it time to clean up."""
        self._owner.loop.call_soon_threadsafe(lambda: self._task and self._task.cancel())
        concurrent.futures.wait([self.future], timeout=_CANCEL_TIMEOUT)


def call(work: Coroutine[Any, Any, _T]) -> _T:
    """Run a coroutine in the background and return its result. It is cancelled if this call is interrupted."""
    running = Call(work)
    try:
        return running.future.result()
    except VmspawnError as error:
        # What happened in the other thread on the way is no news to the caller.
        error.__traceback__ = None
        raise
    finally:
        if not running.future.done():
            running.cancel()


def finish(work: Coroutine[Any, Any, _T]) -> _T:
    """Run a coroutine to its end: an interruption is raised when it is done. A second one is obeyed at once."""
    running = Call(work)
    try:
        return running.future.result()
    except BaseException:
        if running.future.done():
            raise
        running.future.exception()
        raise


def read(inner: _Inner, look: Callable[[_Inner], _T]) -> _T:
    """Return what `look` finds, in the thread that changes it."""

    async def work() -> _T:
        return look(inner)

    return call(work())


class Blocking(Generic[_Inner]):
    """Wraps an object of the asynchronous library."""

    def __init__(self, inner: _Inner) -> None:
        self._inner = inner
        self._pid = os.getpid()

    def __repr__(self) -> str:
        return repr(self._inner)

    @property
    def _is_inherited(self) -> bool:
        """Whether this process is a child of the one that made it."""
        return self._pid != os.getpid()

    def _check(self) -> _Inner:
        if self._is_inherited:
            raise NotConnected(
                f"{self._inner!r} belongs to process {self._pid}, which forked this one",
                hint="a child uses vmspawn.sync.connect, or makes machines of its own",
            )
        return self._inner

    def _call(self, work: Callable[[_Inner], Coroutine[Any, Any, _T]]) -> _T:
        return call(work(self._check()))

    def _read(self, look: Callable[[_Inner], _T]) -> _T:
        return read(self._check(), look)


class BlockingMachine(Blocking[_Inner]):
    """A machine that is ended on the way out, or with the process."""

    def _enter(self, enter: Callable[[_Inner], Coroutine[Any, Any, object]]) -> None:
        machines = background().open
        # If it is interrupted just when it is up, it ends with the process.
        machines.add(self)
        try:
            self._call(enter)
        except Exception:
            machines.discard(self)
            raise

    def _exit(self, leave: Callable[[_Inner], Coroutine[Any, Any, object]]) -> None:
        if self._is_inherited:
            return
        background().open.discard(self)
        finish(leave(self._inner))


class BlockingContext(AbstractContextManager[_Wrapped]):
    """An asynchronous context manager in blocking calls; `wrap` makes what `with` returns."""

    def __init__(self, manager: AbstractAsyncContextManager[Any], wrap: Callable[[Any], _Wrapped]) -> None:
        self._manager = manager
        self._wrap = wrap
        self._pid = os.getpid()

    def __enter__(self) -> _Wrapped:
        return self._wrap(call(_entered(self._manager)))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._pid == os.getpid():
            # The error is the program's: what the manager does is the same for all of them.
            finish(_left(self._manager))


async def _entered(manager: AbstractAsyncContextManager[_T]) -> _T:
    return await manager.__aenter__()


async def _left(manager: AbstractAsyncContextManager[Any]) -> None:
    await manager.__aexit__(None, None, None)


def blocking_iterator(stream: AsyncIterator[_T]) -> Iterator[_T]:
    """Iterate over an asynchronous iterator in blocking calls."""

    async def step() -> tuple[_T, ...]:
        try:
            return (await anext(stream),)
        except StopAsyncIteration:
            return ()

    while found := call(step()):
        yield found[0]


def _end_open() -> None:
    """End the machines that still run."""
    if _background is None:
        return
    for machine in tuple(_background.open):
        with suppress(Exception):
            running = Call(machine._inner.__aexit__(None, None, None))
            running.future.result(timeout=_EXIT_TIMEOUT)


atexit.register(_end_open)
