# SPDX-License-Identifier: LGPL-2.1-or-later
"""Waits until conditions of a machine hold: the agent answers, the guest has booted, a process listens on a port.

A command in the guest checks the conditions that only the guest knows, until they hold: the kernel has no event for a
listening port, and systemd has no event that a shell could wait for. After a reboot the command is started again.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence

from ..agent.protocol import STDOUT, Exited
from ..errors import MachineEnded, NotConnected, NotSupported, UsageError
from ..machine.running import Running
from ..network.forward import SSH_PORT, is_ssh, local_address
from ..timeouts import FOREVER
from .commands import Wanted
from .conditions import Condition, Missing
from .inside import Inside

#: Seconds before a guest that has rebooted, or a server that closed the connection, is asked again.
_RETRY_INTERVAL = 0.2

#: Exit status of a script for a condition that never holds in this guest.
_NEVER = 2

_BANNER = b"SSH-"

#: Seconds within which a server must send its banner. QEMU keeps the connection of a guest that was reset meanwhile.
_BANNER_TIMEOUT = 30.0

#: Prints the state of the boot whenever it changes. `elif` is for the built-in guest: the first file
#: exists if commands run in its own root, the second one if they run in a directory of the host.
_BOOTED = """
while :; do
    if [ -d /run/systemd/system ]; then
        state=$(systemctl is-system-running 2>/dev/null)
        case $state in running | degraded) exit 0 ;; esac
    elif [ -e /lib/vmspawn/functions ] || [ -f /run/vmspawn/agent ]; then
        [ ! -e /run/vmspawn/ready ] || exit 0
        state=starting
    else
        echo "the guest has no systemd, and its init does not report the end of the boot"
        exit 2
    fi
    [ "$state" = "$last" ] || echo "${state:-starting}"
    last=$state
    sleep 0.1
done
"""

#: Argument: the port in hexadecimal digits. 0A is the state of a listening socket (TCP_LISTEN in tcp_states.h).
_PORT = """
until grep -Eqs "^ *[0-9]+: [0-9A-F]+:$1 [0-9A-F]+:0000 0A " /proc/net/tcp /proc/net/tcp6; do
    sleep 0.1
done
"""


async def wait_for(machine: Running, inside: Inside, conditions: Sequence[Condition], timeout: float) -> list[Missing]:
    """Wait until all conditions hold. Returns the conditions that do not hold after `timeout` seconds.

    Raises MachineEnded, NoSuchStorage, UsageError, NotSupported if a condition never holds in this machine, or an error
    of `Commands.start`.
    """
    waits = [_Wait(machine, inside, each) for each in conditions]
    tasks = {asyncio.create_task(each.until_it_holds()): each for each in waits}
    ended = asyncio.create_task(machine.wait())
    deadline = asyncio.get_running_loop().time() + timeout
    try:
        pending: set[asyncio.Task[None]] = set(tasks)
        while pending and (left := deadline - asyncio.get_running_loop().time()) > 0:
            done, _ = await asyncio.wait({*pending, ended}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            for task in done & pending:
                task.result()
            pending -= done
            if pending and ended in done:
                raise MachineEnded(f"{ended.result().message} before {_names(pending, tasks)}")
        return [Missing(str(tasks[each].condition), tasks[each].why) for each in tasks if each in pending]
    finally:
        for each in (*tasks, ended):
            each.cancel()
        await asyncio.wait({*tasks, ended})
        for task in tasks:
            task.cancelled() or task.exception()


def _names(pending: set[asyncio.Task[None]], tasks: dict[asyncio.Task[None], _Wait]) -> str:
    return ", ".join(str(wait.condition) for task, wait in tasks.items() if task in pending)


class _Wait:
    """One condition that is waited for."""

    def __init__(self, machine: Running, inside: Inside, condition: Condition) -> None:
        self._machine = machine
        self._inside = inside
        self.condition = condition
        self._why = ""
        self._output: socket.socket | None = None

    @property
    def why(self) -> str:
        """The reason why the condition does not hold, or an empty string if it is unknown."""
        if self._output is not None:
            try:
                lines = self._output.recv(4096).decode(errors="replace").split("\n")
            except OSError:
                lines = []
            self._why = next((line for line in reversed(lines) if line), self._why)
        return self._why

    async def until_it_holds(self) -> None:
        """Wait until the condition holds, for as long as it takes."""
        match self.condition:
            case Condition("agent"):
                self._why = "the agent in the guest does not answer"
                await self._in_guest(":")
            case Condition("booted"):
                self._why = "the agent in the guest does not answer"
                await self._in_guest(_BOOTED)
            case Condition("port", value):
                await self._until_port(int(value))
            case Condition("disk", value):
                self._why = "the guest has made no request to it"
                await self._machine.storage.wait_taken(value, FOREVER)
            case Condition("ssh"):
                await self._until_ssh()
            case _:
                raise UsageError(f"the machine's manager does not support the condition {self.condition}")

    async def _until_port(self, port: int) -> None:
        self._why = "nothing listens on it in the guest"
        await self._in_guest(_PORT, f"{port:04X}")

    async def _until_ssh(self) -> None:
        """Wait for the banner of the guest's SSH server on a forwarded port. Without a forward, wait for the port."""
        forwards = await self._machine.forwards.list()
        found = next(filter(is_ssh, forwards), None)
        if found is None:
            await self._until_port(SSH_PORT)
            return
        self._why = f"no SSH server answers on {found.host}"
        while not await _is_ssh_server(local_address(found), found.port):  # noqa: ASYNC110 - a server's start causes no event
            await asyncio.sleep(_RETRY_INTERVAL)

    async def _in_guest(self, script: str, *arguments: str) -> None:
        """Run a script in the guest until it succeeds. Raises NotSupported if the script reports that it never will."""
        words = ["sh", "-c", script, "sh", *arguments]
        wanted = Wanted(arguments=[each.encode() for each in words], stdin=False)
        while True:
            try:
                if await self._succeeds(wanted):
                    return
            except NotConnected as error:
                # The guest has rebooted. If the machine has ended, `wait_for` cancels this task.
                self._why = str(error)
            await asyncio.sleep(_RETRY_INTERVAL)

    async def _succeeds(self, wanted: Wanted) -> bool:
        execution = await self._inside.commands.start(wanted, timeout=FOREVER)
        try:
            output = execution.streams[STDOUT]
            output.setblocking(False)
            self._output = output
            end = await execution.ended()
            if isinstance(end, Exited) and end.status == _NEVER:
                raise NotSupported(f"{self.condition} cannot be waited for: {self.why}")
            return isinstance(end, Exited) and end.status == 0
        finally:
            self._output = None
            execution.close()


async def _is_ssh_server(address: str, port: int, timeout: float = _BANNER_TIMEOUT) -> bool:
    """Return whether a server sends the banner of SSH in time."""
    writer: asyncio.StreamWriter | None = None
    try:
        async with asyncio.timeout(timeout):
            reader, writer = await asyncio.open_connection(address, port)
            return await reader.readexactly(len(_BANNER)) == _BANNER
    except (OSError, asyncio.IncompleteReadError):  # TimeoutError is an OSError
        return False
    finally:
        if writer is not None:
            writer.close()
