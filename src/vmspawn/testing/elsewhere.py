# SPDX-License-Identifier: LGPL-2.1-or-later
"""Makes the objects of one event loop usable on other event loops."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Coroutine
from typing import Any, cast

from ..api import blocking
from ..api.console import Console
from ..api.events import Events
from ..api.execution import Execution
from ..api.machine import Machine
from ..errors import VmspawnError
from ..qmp.monitor import Monitor

#: pytest omits this module from its tracebacks.
__tracebackhide__ = True

#: Classes whose objects may be used only in the thread of their own loop.
_BOUND = (Machine, Console, Events, Monitor, Execution, asyncio.StreamReader, asyncio.StreamWriter)


def elsewhere(machine: Machine) -> Machine:
    """Return a proxy of a machine that belongs to the loop of `vmspawn.sync`. Any event loop can use the proxy."""
    return cast(Machine, _Elsewhere(machine))


class _Elsewhere:
    """Forwards each call and attribute access to the loop of `vmspawn.sync`."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __repr__(self) -> str:
        return repr(self._inner)

    def __getattr__(self, name: str) -> Any:
        value = blocking.read(self._inner, lambda inner: getattr(inner, name))
        return _function(value) if inspect.ismethod(value) else _bridged(value)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return _function(self._inner)(*arguments, **named)

    async def __aenter__(self) -> Any:
        return await _awaited(self._inner.__aenter__())

    async def __aexit__(self, *_: object) -> None:
        await _awaited(self._inner.__aexit__(None, None, None))

    def __aiter__(self) -> _Elsewhere:
        return self

    async def __anext__(self) -> Any:
        async def step() -> tuple[Any, ...]:
            try:
                return (await anext(self._inner),)
            except StopAsyncIteration:
                return ()

        found = await _awaited(step())
        if not found:
            raise StopAsyncIteration
        return _bridged(found[0])


def _function(method: Any) -> Any:
    def call(*arguments: Any, **named: Any) -> Any:
        return _bridged(blocking.read(method, lambda method: method(*arguments, **named)))

    return call


def _bridged(value: Any) -> Any:
    if inspect.iscoroutine(value):
        return _awaited(value)
    if isinstance(value, _BOUND) or hasattr(value, "__aenter__") or hasattr(value, "__anext__"):
        return _Elsewhere(value)
    return value


async def _awaited(work: Coroutine[Any, Any, Any]) -> Any:
    """Await a coroutine that runs on the other loop. Cancelling this call cancels the coroutine."""
    running = blocking.Call(work).start()
    try:
        return _bridged(await asyncio.wrap_future(running.future))
    except asyncio.CancelledError:
        await asyncio.to_thread(running.cancel)
        raise
    except VmspawnError as error:
        # The frames of the other loop do not help the test's author.
        error.__traceback__ = None
        raise
