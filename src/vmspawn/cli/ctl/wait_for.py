# SPDX-License-Identifier: LGPL-2.1-or-later
"""Implements the verb `wait`, which waits until conditions of a machine hold."""

from __future__ import annotations

import argparse
import time

from ...errors import NotConnected, Timeout, UsageError
from ...host.runtime import check_name
from ...inside import conditions
from ...inside.conditions import KINDS
from ...timeouts import REPLY_GRACE
from .verbs import Verbs

#: The default timeout, in seconds.
_TIMEOUT = 120.0

#: The minimum number of seconds for the conditions, even if the manager answers late. A shorter --timeout= is obeyed.
_LOOK_TIME = 5.0

#: Seconds between two attempts to find a machine that does not exist yet.
_LOOK_INTERVAL = 0.1


def add(verbs: Verbs) -> None:
    """Add the verb."""
    parser = verbs.add_for_machine("wait", _wait, "wait until a machine is ready", "--for=CONDITION…")
    parser.describe("--timeout", f"time to wait for the conditions (default: {_TIMEOUT:g})")
    known = ", ".join(f"{name}={value}" if value else name for name, value in KINDS.items())
    parser.add_argument(
        "--for",
        dest="conditions",
        metavar="CONDITION",
        action="append",
        default=[],
        help=f"wait for this condition: {known}; repeatable",
    )


def _wait(options: argparse.Namespace) -> None:
    """Wait. Raises Timeout, which names the conditions that do not hold, or MachineEnded."""
    if not options.conditions:
        raise UsageError("nothing to wait for", hint="write for example --for=booted")
    check_name(options.machine)
    wanted = [conditions.parse(each) for each in options.conditions]
    timeout = _TIMEOUT if options.timeout is None else options.timeout
    # No other verb needs these modules.
    import asyncio

    with asyncio.Runner() as runner:
        runner.run(_wait_for(options.machine, list(map(str, wanted)), timeout))


async def _wait_for(name: str, wanted: list[str], timeout: float) -> None:
    import asyncio
    from contextlib import AsyncExitStack

    from ...api.connect import connect

    deadline = time.monotonic() + timeout
    while True:
        try:
            async with AsyncExitStack() as stack:
                async with asyncio.timeout(max(0.0, deadline - time.monotonic()) + REPLY_GRACE):
                    machine = await stack.enter_async_context(connect(name))
                left = max(deadline - time.monotonic(), min(_LOOK_TIME, timeout))
                return await machine.wait_for(*wanted, timeout=left)
        except TimeoutError:
            raise Timeout(f"machine {name} did not answer: it hangs, or is still starting") from None
        except NotConnected:
            if set(wanted) == {"off"}:
                return None
            # The machine may start soon.
            if time.monotonic() + _LOOK_INTERVAL >= deadline:
                raise
        await asyncio.sleep(_LOOK_INTERVAL)
