# SPDX-License-Identifier: LGPL-2.1-or-later
"""Implements Varlink's `upgrade`: after the reply to a call with `upgrade`, the connection uses another protocol.

An upgradable method has a second coroutine, which runs instead if a call sets `upgrade`. The coroutine gets the call's
parameters, may raise the errors of any method, and returns a function that takes the socket after the reply was sent.
Bytes that the client sent behind its call are still in the socket then.
"""

import socket
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

#: Takes a connected socket, and owns it from then on.
Taker = Callable[[socket.socket], object]

_Method = TypeVar("_Method", bound=Callable[..., Any])
_MARK = "_varlink_upgrade"


def upgradable(by: Callable[..., Awaitable[Taker]]) -> Callable[[_Method], _Method]:
    """Make a method upgradable: `by` is a coroutine of the same class, with the same parameters."""

    def mark(method: _Method) -> _Method:
        setattr(method, _MARK, by)
        return method

    return mark


def upgrader(method: Callable[..., Any]) -> Callable[..., Awaitable[Taker]] | None:
    """Return the coroutine that runs instead of a bound method if a call sets `upgrade`, or None."""
    by = getattr(method, _MARK, None)
    return None if by is None else by.__get__(getattr(method, "__self__", None))
