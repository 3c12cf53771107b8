# SPDX-License-Identifier: LGPL-2.1-or-later
"""Varlink's `upgrade`: a call after whose reply the connection speaks another protocol.

A method that can be upgraded is marked with the coroutine that is run in its place when a call asks for that. It gets
the call's parameters, may fail like any method, and returns who takes the socket over once the reply has left. What the
client sent behind its call is still in the socket then.
"""

import socket
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

#: Takes a connected socket over, and owns it from then on.
Taker = Callable[[socket.socket], object]

_Method = TypeVar("_Method", bound=Callable[..., Any])
_MARK = "_varlink_upgrade"


def upgradable(by: Callable[..., Awaitable[Taker]]) -> Callable[[_Method], _Method]:
    """Mark a method as one that `by`, a coroutine of the same class with the same parameters, upgrades."""

    def mark(method: _Method) -> _Method:
        setattr(method, _MARK, by)
        return method

    return mark


def upgrader(method: Callable[..., Any]) -> Callable[..., Awaitable[Taker]] | None:
    """What to run in place of a bound method when its call asks for an upgrade, or None if it has no such thing."""
    by = getattr(method, _MARK, None)
    return None if by is None else by.__get__(getattr(method, "__self__", None))
