# SPDX-License-Identifier: LGPL-2.1-or-later
"""Runs commands in the guest, waits for it and copies files, for machines of this process and of others."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, overload

from ..inside.commands import Wanted
from ..inside.conditions import Condition, Missing
from ..machine.ending import End
from ..timeouts import COMMAND_START_TIMEOUT
from . import copying, waiting
from .console import Console
from .execution import Completed, Execution, Remote, arguments_of, attend, environment_of, run_to_end, shell_or
from .options import StrPath
from .waiting import WAIT_TIMEOUT


class Guest(ABC):
    """The methods that run commands in the guest, wait for it, or copy files."""

    @property
    @abstractmethod
    def name(self) -> str:
        """The machine's name."""

    @property
    @abstractmethod
    def console(self) -> Console:
        """The guest's console. Raises NotSupported if the machine shares no console."""

    @abstractmethod
    async def wait(self) -> End:
        """Wait for the machine's end, and return how it ended."""

    @abstractmethod
    async def _start_command(self, wanted: Wanted, timeout: float) -> Remote:
        """Start a command. Raises the errors of `execute`."""

    @abstractmethod
    async def _wait_by_manager(self, conditions: Sequence[Condition], timeout: float) -> Sequence[Missing]:
        """Let the machine's manager wait until conditions hold; returns those that do not after `timeout` seconds."""

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

        `stdin`, `stdout` and `stderr` of the result are streams of bytes. With `size`, in rows and columns, the command
        has a terminal. A terminal without a command runs the login shell.

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
        return await attend(await self._start_command(wanted, start_timeout))

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

        Without `check`, a command that cannot be started has the status 126 or 127, as in a shell; with `check`, raises
        CommandFailed if the status is not 0. Raises Timeout if the command takes longer than `timeout` seconds, and the
        other errors of `execute`.
        """

        async def start() -> Execution:
            return await self.execute(shell_or(command), env=env, cwd=cwd, user=user, stdin=input is not None)

        done = await run_to_end(start, check=check, input=input, timeout=timeout)
        if text:
            return Completed(done.status, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace"))
        return done

    async def wait_for(self, *conditions: str, timeout: float = WAIT_TIMEOUT) -> None:
        """Wait until all conditions hold: `await machine.wait_for("booted", "port=80")`.

        The conditions are `agent` (commands can be run), `booted` (the guest's init reports the end of the boot),
        `console=REGEX` (the console has shown a match), `disk=NAME` (the guest uses the disk), `port=N` (the guest
        listens on the TCP port), `ssh` (the guest's SSH server answers) and `off` (the machine has ended).

        Raises Timeout, which names the conditions that do not hold after `timeout` seconds; MachineEnded; NotSupported
        for a condition that never holds in this guest; UsageError, NoSuchStorage.
        """
        await waiting.wait_for(
            self.name,
            conditions,
            timeout,
            of_manager=self._wait_by_manager,
            console=lambda: self.console,
            end=self.wait,
        )

    async def copy_to(
        self,
        sources: StrPath | Sequence[StrPath],
        target: str,
        *,
        skip_special: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[str]:
        """Copy files and directories of this host to a path in the guest, or into it if it is a directory.

        Permissions, times, links and holes are copied, owners are not. `skip_special` leaves out devices, sockets and
        named pipes, and returns a line about each. `progress` is called with the number of copied bytes and the total.

        Raises CopyFailed, SystemFailure, UsageError, or an error of `execute`; then no incomplete file is left.
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
        """Copy files and directories of the guest to a path of this host, or into it if it is a directory.

        The guest is not trusted: devices, and links that lead out of the source, are refused, or left out with
        `skip_special`. Everything else is as for `copy_to`.
        """
        return await copying.copy(
            self._start_for_copy, sources, target, to_guest=False, skip_special=skip_special, progress=progress
        )

    async def _start_for_copy(self, wanted: Wanted) -> Remote:
        return await self._start_command(wanted, COMMAND_START_TIMEOUT)
