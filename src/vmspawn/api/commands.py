# SPDX-License-Identifier: LGPL-2.1-or-later
"""Runs commands in a machine's guest, for machines of this and of other processes."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, overload

from ..inside.commands import Wanted
from ..timeouts import COMMAND_START_TIMEOUT
from . import copying
from .execution import Completed, Execution, Remote, arguments_of, environment_of, run_to_end, shell_or
from .options import StrPath


class Guest(ABC):
    """The methods that run commands in the guest."""

    @abstractmethod
    async def _start_command(self, wanted: Wanted, timeout: float) -> Remote:
        """Start a command. Raises the errors of `execute`."""

    async def execute(
        self,
        command: Sequence[str | bytes],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        user: str | None = None,
        size: tuple[int, int] | None = None,
        stdin: bool = True,
        start_timeout: float = COMMAND_START_TIMEOUT,
    ) -> Execution:
        """Start a command in the guest: `async with await machine.execute(["cat"]) as command:`.

        The streams are like the streams of asyncio's subprocesses. With `size`, in rows and columns, the command has a
        terminal. A terminal without a command runs the login shell.

        Raises CommandFailed if the command cannot be started, Timeout if the agent in the guest does not answer within
        `start_timeout` seconds, NoFreePort, NotSupported or NotConnected.
        """
        wanted = Wanted(
            arguments=arguments_of(command, terminal=size is not None),
            environment=environment_of(env),
            directory=None if cwd is None else os.fsencode(cwd),
            user=None if user is None else os.fsencode(user),
            size=size,
            stdin=stdin,
        )
        return await Execution(await self._start_command(wanted, start_timeout)).open()

    @overload
    async def run(
        self,
        command: str | Sequence[str | bytes],
        *,
        check: bool = False,
        input: str | bytes | None = None,
        timeout: float | None = None,
        text: Literal[True] = True,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        user: str | None = None,
    ) -> Completed[str]: ...

    @overload
    async def run(
        self,
        command: str | Sequence[str | bytes],
        *,
        check: bool = False,
        input: str | bytes | None = None,
        timeout: float | None = None,
        text: Literal[False],
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        user: str | None = None,
    ) -> Completed[bytes]: ...

    async def run(
        self,
        command: str | Sequence[str | bytes],
        *,
        check: bool = False,
        input: str | bytes | None = None,
        timeout: float | None = None,
        text: bool = True,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        user: str | None = None,
    ) -> Completed[str] | Completed[bytes]:
        """Run a command in the guest until it ends. A string is a command line for the guest's `sh`.

        With `check`, raises CommandFailed if the status is not 0. Raises Timeout if the command takes longer than
        `timeout` seconds, and the errors of `execute`.
        """

        async def start() -> Execution:
            return await self.execute(shell_or(command), env=env, cwd=cwd, user=user, stdin=input is not None)

        done = await run_to_end(start, check=check, input=input, timeout=timeout)
        if text:
            return Completed(done.status, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace"))
        return done

    async def copy_to(
        self,
        sources: StrPath | Sequence[StrPath],
        target: str,
        *,
        skip_special: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[str]:
        """Copy files and folders of this host to a path in the guest; into it, if it is a folder.

        Modes, times, links and holes are kept, owners are not. `skip_special` leaves out devices, sockets and pipes;
        returns lines about them. `progress` is called with the bytes that are done and those in all. Raises
        CopyFailed, and nothing half is left under a final name then; SystemFailure, UsageError, or what `execute`
        raises.
        """
        return await copying.copy(
            self._start_for_copy, sources, target, to_guest=True, skip_special=skip_special, progress=progress
        )

    async def copy_from(
        self,
        sources: str | Sequence[str],
        target: StrPath,
        *,
        skip_special: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[str]:
        """Copy files and folders of the guest to a path of this host; into it, if it is a folder.

        It trusts nothing that the guest sends: devices, and links that lead out of what is copied, are refused, or left
        out with `skip_special`. Else it is as `copy_to`.
        """
        return await copying.copy(
            self._start_for_copy, sources, target, to_guest=False, skip_special=skip_special, progress=progress
        )

    async def _start_for_copy(self, wanted: Wanted) -> Remote:
        return await self._start_command(wanted, COMMAND_START_TIMEOUT)
