# SPDX-License-Identifier: LGPL-2.1-or-later
"""Runs the library's coroutines for blocking code, on one event loop in a background thread.

The first call starts the thread. When the process exits, machines that still run are ended. An interrupted call
(Ctrl-C) is cancelled, and cleans up before KeyboardInterrupt is raised. A child of fork(2) cannot use its parent's
machines: calls on them raise NotConnected. The child may make machines of its own.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import math
import os
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import AbstractAsyncContextManager, AbstractContextManager, suppress
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

from ..errors import NotConnected, UsageError, VmspawnError

#: pytest omits functions of this module from its tracebacks.
__tracebackhide__ = True

_T = TypeVar("_T")
_Inner = TypeVar("_Inner")
_Wrapped = TypeVar("_Wrapped", covariant=True)

#: Seconds within which an interrupted call must clean up.
_CANCEL_TIMEOUT = 15.0

#: The most seconds until a signal is handled: Python does not notice a signal that arrives just before a wait.
_SIGNAL_INTERVAL = 1.0

#: Seconds within which machines must end when the process exits.
_EXIT_TIMEOUT = 15.0


class _Background:
    """The background thread and its event loop."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self._run, name="vmspawn", daemon=True)
        self.pid = os.getpid()
        #: Machines to end when the process exits.
        self.open: set[Blocking[Any]] = set()
        self.thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()


_lock = threading.Lock()
_background: _Background | None = None
#: The parent's background thread, in a child of fork(2). Collecting it would close the parent's descriptors.
_abandoned: list[_Background] = []


def background() -> _Background:
    """Return the background thread of this process, and start it if necessary."""
    global _background
    if _background is not None:
        return _background
    with _lock:
        if _background is None:
            _background = _Background()
        return _background


def _forget() -> None:
    """Forget the parent's thread, which does not exist in a child of fork(2)."""
    global _background
    if _background is not None:
        _abandoned.append(_background)
        _background = None
    _lock.release()


os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_forget)


class _End:
    """The end of a call, for which one thread waits.

    An interruption (Ctrl-C) inside threading's and concurrent.futures' waits may leave their locks locked; then the
    event loop would block for ever. The lock here protects nothing: it is released when the end is reached.
    """

    def __init__(self) -> None:
        self.is_reached = False
        self._lock = threading.Lock()
        self._lock.acquire()

    def reach(self) -> None:
        """Wake the waiting thread. May be called once."""
        self.is_reached = True
        self._lock.release()

    def wait(self, timeout: float) -> bool:
        """Wait for up to `timeout` seconds. Returns whether the end is reached."""
        deadline = time.monotonic() + timeout
        while not self.is_reached and (left := deadline - time.monotonic()) > 0:
            self._lock.acquire(timeout=min(left, _SIGNAL_INTERVAL))
        return self.is_reached


class Call(Generic[_T]):
    """A coroutine that runs in the background from `start` on.

    Creating a Call does not start the coroutine, so an interruption (Ctrl-C) before `start` leaves nothing running.
    """

    def __init__(self, work: Coroutine[Any, Any, _T]) -> None:
        self._owner = background()
        if threading.current_thread() is self._owner.thread:
            work.close()
            raise UsageError(
                "a blocking call in the thread of vmspawn's event loop would block it for ever",
                hint="do not call vmspawn in functions that are passed to wait()",
            )
        self._work = work
        self._task: asyncio.Task[_T] | None = None
        self._end = _End()
        #: The result. A thread that may be interrupted must not wait for it.
        self.future: concurrent.futures.Future[_T] = concurrent.futures.Future()

    @property
    def is_done(self) -> bool:
        """True if the coroutine has ended, or will not begin."""
        return self._end.is_reached

    def start(self) -> Self:
        """Start the coroutine, unless it is started already."""
        self._owner.loop.call_soon_threadsafe(self._begin)
        return self

    def _begin(self) -> None:
        if self._task is None and not self._end.is_reached:
            self._task = self._owner.loop.create_task(self._work)
            self._task.add_done_callback(self._on_done)

    def _on_done(self, task: asyncio.Task[_T]) -> None:
        try:
            if task.cancelled():
                self.future.cancel()
            elif error := task.exception():
                self.future.set_exception(error)
            else:
                self.future.set_result(task.result())
        finally:
            # The last reference to the task is dropped here, in the event loop's thread. asyncio has a weak reference
            # to it with a callback, whose exceptions Python ignores: in the main thread, a KeyboardInterrupt in it
            # would be lost.
            self._task = None
            self._end.reach()

    def wait(self, timeout: float = math.inf) -> bool:
        """Wait for the coroutine's end, for up to `timeout` seconds. Returns whether it has ended."""
        return self._end.wait(timeout)

    def result(self) -> _T:
        """Wait for the coroutine's end, and return its result. Raises what the coroutine raised."""
        self.wait()
        return self.future.result()

    def cancel(self) -> None:
        """Cancel the coroutine, and give it time to clean up."""
        self._owner.loop.call_soon_threadsafe(self._cancel)
        self.wait(_CANCEL_TIMEOUT)

    def _cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()
        elif not self._end.is_reached:
            self._work.close()
            self.future.cancel()
            self._end.reach()


def call(work: Coroutine[Any, Any, _T]) -> _T:
    """Run a coroutine in the background and return its result. It is cancelled if this call is interrupted."""
    running = Call(work)
    try:
        return running.start().result()
    except VmspawnError as error:
        # The other thread's frames do not help the caller.
        error.__traceback__ = None
        raise
    finally:
        if not running.is_done:
            running.cancel()


def finish(work: Coroutine[Any, Any, _T]) -> _T:
    """Run a coroutine until it ends. A first interruption is raised at the end, a second one at once."""
    running = Call(work)
    try:
        return running.start().result()
    except BaseException:
        if not running.is_done:
            running.start().wait()
        raise


def read(inner: _Inner, look: Callable[[_Inner], _T]) -> _T:
    """Return the result of `look`, called in the background thread."""

    async def work() -> _T:
        return look(inner)

    return call(work())


class Blocking(Generic[_Inner]):
    """Wraps an object of the asynchronous library for blocking code."""

    def __init__(self, inner: _Inner) -> None:
        self._inner = inner
        self._pid = os.getpid()

    def __repr__(self) -> str:
        return repr(self._inner)

    @property
    def _is_inherited(self) -> bool:
        """Return whether the object belongs to the parent of this process."""
        return self._pid != os.getpid()

    def _check(self) -> _Inner:
        if self._is_inherited:
            raise NotConnected(
                f"{self._inner!r} belongs to process {self._pid}, which forked this one",
                hint="use vmspawn.sync.connect in the child, or start another machine there",
            )
        return self._inner

    def _call(self, work: Callable[[_Inner], Coroutine[Any, Any, _T]]) -> _T:
        return call(work(self._check()))

    def _read(self, look: Callable[[_Inner], _T]) -> _T:
        return read(self._check(), look)


class BlockingMachine(Blocking[_Inner]):
    """A machine that ends with the `with` statement, or when the process exits."""

    @classmethod
    def _around(cls, inner: _Inner) -> Self:
        """Wrap a machine that exists."""
        machine = object.__new__(cls)
        Blocking.__init__(machine, inner)
        return machine

    def _enter(self, enter: Callable[[_Inner], Coroutine[Any, Any, object]]) -> None:
        machines = background().open
        # If the call is interrupted just after the start, the machine ends when the process exits.
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
    """A blocking context manager for an asynchronous one. `wrap` makes the value of `with`."""

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
            # The error is not passed on: the asynchronous context managers exit in the same way for all errors.
            finish(_left(self._manager))


async def _entered(manager: AbstractAsyncContextManager[_T]) -> _T:
    return await manager.__aenter__()


async def _left(manager: AbstractAsyncContextManager[Any]) -> None:
    await manager.__aexit__(None, None, None)


def blocking_iterator(stream: AsyncIterator[_T]) -> Iterator[_T]:
    """Iterate over an asynchronous iterator with blocking calls."""

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
            Call(machine._inner.__aexit__(None, None, None)).start().wait(_EXIT_TIMEOUT)


atexit.register(_end_open)
