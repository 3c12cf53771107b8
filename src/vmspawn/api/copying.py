# SPDX-License-Identifier: LGPL-2.1-or-later
"""Copies files to and from a guest in a thread, with commands that the event loop starts."""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import socket
from collections.abc import Awaitable, Callable, Sequence

from ..agent.protocol import STDERR, STDIN, STDOUT
from ..errors import NotConnected
from ..inside.commands import Wanted
from ..inside.copying import Copying, Ended, Progress, hang_up
from .execution import End, Remote
from .options import StrPath

#: Starts a command.
StartRemote = Callable[[Wanted], Awaitable[Remote]]

#: Seconds that ending a command may take.
_CLOSE_TIMEOUT = 30.0


class _Command:
    """A command that the event loop has started. Its methods block, and are called in other threads."""

    def __init__(self, loop: asyncio.AbstractEventLoop, remote: Remote) -> None:
        self._loop = loop
        self._remote = remote
        self._waiting: concurrent.futures.Future[End] | None = None
        for each in remote.streams.values():
            each.setblocking(True)
        self.stdin: socket.socket | None = remote.streams.get(STDIN)
        self.stdout = remote.streams[STDOUT]
        self.stderr = remote.streams[STDERR]

    def wait(self) -> Ended:
        """Wait for the command's end. Raises NotConnected."""
        self._waiting = asyncio.run_coroutine_threadsafe(self._remote.ended(), self._loop)
        try:
            end = self._waiting.result()
        except concurrent.futures.CancelledError:
            raise NotConnected("the command was ended") from None
        return Ended(end.status, end.stdout, end.stderr)

    def close(self) -> None:
        """End the command, and close its streams. Called in the thread that started the command."""
        hang_up(self)
        if self._waiting is not None:
            self._waiting.cancel()
        asyncio.run_coroutine_threadsafe(self._remote.close(), self._loop).result(_CLOSE_TIMEOUT)
        for each in self._remote.streams.values():
            each.close()


async def copy(
    start: StartRemote,
    sources: StrPath | Sequence[StrPath],
    target: StrPath,
    *,
    to_guest: bool,
    skip_special: bool,
    progress: Progress | None,
) -> list[str]:
    """Copy, and return lines about the files that were left out. `progress` is called on the event loop.

    Raises the errors of `Copying`. A cancelled copy is cleaned up before CancelledError is raised.
    """
    loop = asyncio.get_running_loop()

    def start_in_loop(arguments: Sequence[bytes], has_input: bool) -> _Command:
        wanted = Wanted(arguments=arguments, stdin=has_input)
        return _Command(loop, asyncio.run_coroutine_threadsafe(_awaited(start(wanted)), loop).result())

    on_progress = None if progress is None else _on_loop(loop, progress)
    copying = Copying(start_in_loop, skip_special=skip_special, on_progress=on_progress)
    named = [sources] if isinstance(sources, str | os.PathLike) else sources
    paths = [os.fspath(each) for each in named]
    verb = copying.to_guest if to_guest else copying.from_guest
    work = asyncio.create_task(asyncio.to_thread(verb, paths, os.fspath(target)))
    try:
        await asyncio.shield(work)
    except asyncio.CancelledError:
        copying.cancel()
        await asyncio.wait({work})
        raise
    return copying.skipped


def _on_loop(loop: asyncio.AbstractEventLoop, progress: Progress) -> Progress:
    """Return a function for other threads that calls `progress` on the event loop."""

    def report(done: int, total: int) -> None:
        loop.call_soon_threadsafe(progress, done, total)

    return report


async def _awaited(starting: Awaitable[Remote]) -> Remote:
    return await starting
