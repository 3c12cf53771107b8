# SPDX-License-Identifier: LGPL-2.1-or-later
"""Run commands in the guest: each has ports for its streams, and the agent starts it on them.

The streams are the client's: this process sees the status port only.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from errno import ESTALE
from typing import Any

from ..agent import protocol
from ..agent.protocol import (
    STATUS,
    STDIN,
    Exited,
    Failed,
    InputClosed,
    Lost,
    Malformed,
    Refused,
    Run,
    Signalled,
    Started,
    StatusMessage,
)
from ..boot.console import COMMAND_NUMBERS, CONTROLLER
from ..errors import NoFreePort, NotConnected, NotSupported, Timeout, VmspawnError
from ..host import runtime
from ..machine.running import Running
from ..qmp.events import Event
from ..timeouts import COMMAND_START_TIMEOUT
from .agent import Agent
from .ports import AttachedPort, Ports
from .streams import PIPES, TERMINAL, Streams, StreamSet

#: Commands of one machine at once.
COMMANDS_MAX = 32

_RECEIVE_SIZE = 4096

#: Seconds after the end of a status port in which the machine's own end is noticed.
_END_TIMEOUT = 5.0

#: How a command ended.
Ended = Exited | Signalled | Failed

#: What ends all commands, for people, by QEMU's event.
_INTERRUPTIONS = {
    "RESET": "the guest was rebooted",
    "SUSPEND": "the guest was suspended",
    "SUSPEND_DISK": "the guest was suspended to its disk",
}


@dataclass(frozen=True, slots=True)
class Wanted:
    """A command as a client wants it. Without arguments it is the user's login shell."""

    arguments: Sequence[bytes] = ()
    environment: Mapping[bytes, bytes] = field(default_factory=dict)
    directory: bytes | None = None
    user: bytes | None = None
    #: The terminal's rows and columns; None for a command with pipes.
    size: tuple[int, int] | None = None
    stdin: bool = True


class Execution:
    """A command that was sent to the agent. `close` must follow: it ends the command if that still runs."""

    def __init__(self, commands: Commands, plugged: StreamSet, wanted: Wanted) -> None:
        self._commands = commands
        #: Its ports.
        self.plugged = plugged
        self.wanted = wanted
        #: Whether the agent was told of it twice.
        self.is_resent = False
        self._reader = protocol.status_reader()
        self._loop = asyncio.get_running_loop()
        self._started: asyncio.Future[int] = self._loop.create_future()
        self._ended: asyncio.Future[Ended] = self._loop.create_future()
        for each in (self._started, self._ended):
            # Nobody may wait for it.
            each.add_done_callback(lambda future: future.cancelled() or future.exception())
        #: The client's ends of the streams by their names. The client closes them; so does `close`.
        self.streams = {name: each for name, each in plugged.sockets.items() if name != STATUS}
        if not wanted.stdin and wanted.size is None:
            del self.streams[STDIN]
        self._status = plugged.sockets[STATUS]
        self._status.setblocking(False)
        self._loop.add_reader(self._status, self._readable)

    @property
    def id(self) -> str:
        """The command's name in the agent's protocol."""
        return self.plugged.id

    async def started(self) -> int | None:
        """Wait until the command runs. Returns its process id in the guest, or None if it could not be started: `ended`
        returns why. Raises NotConnected, NotSupported."""
        changes: tuple[asyncio.Future[Any], ...] = (self._started, self._ended)
        await asyncio.wait(changes, return_when=asyncio.FIRST_COMPLETED)
        if self._started.done():
            return self._started.result()
        self._ended.result()
        return None

    async def ended(self) -> Ended:
        """Wait for the command's end. Raises NotConnected if the machine ends first, or the guest is reset."""
        return await asyncio.shield(self._ended)

    def resize(self, rows: int, columns: int) -> None:
        """Set the size of the command's terminal."""
        self._commands.agent.send(protocol.resize(self.id, rows, columns))

    def signal(self, number: int) -> None:
        """Send a signal to the command's process group. Raises UsageError if there is no such signal."""
        self._commands.agent.send(protocol.signal(self.id, number))

    def fail(self, error: VmspawnError) -> None:
        """The command has ended, or nobody will learn how."""
        if not self._ended.done():
            self._ended.set_exception(error)

    @property
    def is_starting(self) -> bool:
        """Whether the agent has not reported yet that the command runs."""
        return not self._started.done() and not self._ended.done()

    def _readable(self) -> None:
        try:
            data = self._status.recv(_RECEIVE_SIZE)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._stop_reading()
            # The machine's end, if that is why, is known a moment later.
            removed = NotConnected("the command's ports were removed", hint="somebody else did so through QMP")
            self._loop.call_later(_END_TIMEOUT, self.fail, removed)
            return
        for message in self._reader.feed(data):
            self._handle(message)

    def _handle(self, message: StatusMessage | Malformed) -> None:
        if self._ended.done():
            return
        match message:
            case Started() if not self._started.done():
                self._started.set_result(message.pid)
            case InputClosed():
                pass
            case Exited() | Signalled() | Failed():
                self._ended.set_result(message)
                # What a guest sends after the end is not read.
                self._stop_reading()
            case _:
                self._stop_reading()
                self.fail(NotConnected("the agent in the guest broke its protocol, so the command was ended"))

    def _stop_reading(self) -> None:
        if self._status.fileno() >= 0:
            self._loop.remove_reader(self._status)

    def close(self) -> None:
        """Close the streams and unplug the ports, which kills the command if it still runs. May be called again."""
        self._stop_reading()
        self.fail(NotConnected("the command was ended"))
        self._commands.closed(self, self.plugged)


class Commands:
    """The commands of one machine."""

    def __init__(self, machine: Running) -> None:
        """Raises NotSupported if the machine has no port for the agent."""
        self._machine = machine
        path = machine.directory.file(runtime.QEMU_AGENT)
        if not os.path.exists(path):
            raise NotSupported.with_fields(
                "machine {name} was started without a port for the agent: with {agent=no}, or by an older vmspawn",
                hint="restart the machine to run commands in it",
                name=machine.name,
            )
        self._hotplug = machine.hotplug
        ports = Ports(self._hotplug, CONTROLLER, COMMAND_NUMBERS, machine.attachments)
        self._ports = ports
        self.agent = Agent(self._connect, on_message=self._on_message, on_restart=self._on_restart)
        self._streams = Streams(ports, self.agent, self._hotplug.tasks)
        self._running: dict[str, Execution] = {}
        self._is_closed = False
        #: Commands that run or are being started.
        self._count = 0
        machine.monitor.listen(self._on_event)
        self._end_reason = "the machine ended"
        self._end = self._hotplug.tasks.start(self._until_end())

    def _connect(self) -> socket.socket:
        connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connected.setblocking(False)
            connected.connect(self._machine.directory.socket_address(runtime.QEMU_AGENT))
        except BaseException:
            connected.close()
            raise
        return connected

    async def settle(self) -> None:
        """Unplug the ports of another manager's commands, whose clients are gone. Raises Timeout or NotConnected."""
        await self._ports.settle()
        left: list[AttachedPort] = list(self._ports)
        await asyncio.gather(*map(self._ports.detach, left))

    async def start(self, wanted: Wanted, *, timeout: float = COMMAND_START_TIMEOUT) -> Execution:
        """Start a command. The caller closes what is returned.

        It has been started by then, or could not be. Raises Timeout if the agent does not answer in time, NoFreePort
        if too many commands run, NotSupported, NotConnected, UsageError, QmpError.
        """
        if self._count >= COMMANDS_MAX:
            raise NoFreePort(
                f"{COMMANDS_MAX} commands run in machine {self._machine.name} already", hint="wait until one has ended"
            )
        # What cannot be passed on is refused before anything is plugged in.
        protocol.run(_message(wanted, "check", "check"))
        self._count += 1
        try:
            async with asyncio.timeout(timeout):
                return await self._start(wanted)
        except TimeoutError:
            raise self._too_late(timeout) from None

    async def _start(self, wanted: Wanted) -> Execution:
        try:
            await self._agent_ready()
            plugged = await self._streams.take(PIPES if wanted.size is None else TERMINAL)
        except BaseException:
            self._count -= 1
            raise
        execution = Execution(self, plugged, wanted)
        self._running[execution.id] = execution
        try:
            await self._agent_ready()
            self._send(execution)
            await execution.started()
        except BaseException:
            execution.close()
            raise
        return execution

    async def _agent_ready(self) -> None:
        """Wait for the agent. Raises NotConnected if the machine ends first."""
        waiting = asyncio.ensure_future(self.agent.ready())
        try:
            await asyncio.wait({waiting, self._end}, return_when=asyncio.FIRST_COMPLETED)
            if not waiting.done():
                raise NotConnected(f"the command was not started: {self._end_reason}")
            waiting.result()
        finally:
            waiting.cancel()

    def _too_late(self, timeout: float) -> Timeout:
        machine = self._machine
        late = f"the agent in machine {machine.name} did not answer for {timeout:g} s"
        if not machine.is_running:
            return Timeout(f"{late}: the machine is {machine.status}", hint=f"see: vmctl resume {machine.name}")
        return Timeout(
            late, hint="the guest may still boot, or has no agent; for images of your own see: vmctl help agent"
        )

    def _send(self, execution: Execution) -> None:
        self.agent.send(protocol.run(_message(execution.wanted, execution.id, self.agent.session)))

    # What happens to commands.

    def closed(self, execution: Execution, plugged: StreamSet) -> None:
        """An execution is over."""
        if self._running.pop(execution.id, None) is None:
            return
        self._count -= 1
        if self._is_closed:
            # QEMU ends with its ports, or another manager removes them.
            plugged.close()
        else:
            # In this order, for the next command may be waiting.
            self._streams.replenish()
            self._streams.give_back(plugged)

    def resize(self, id: str, rows: int, columns: int) -> None:
        """Set the size of a command's terminal. Raises NotConnected if there is no such command."""
        self._find(id).resize(rows, columns)

    def signal(self, id: str, number: int) -> None:
        """Send a signal to a command. Raises NotConnected if there is no such command."""
        self._find(id).signal(number)

    def _find(self, id: str) -> Execution:
        if (execution := self._running.get(id)) is None:
            raise NotConnected(f"no command {id} runs")
        return execution

    def _on_message(self, message: Refused | Lost) -> None:
        execution = self._running.get(message.id or "")
        if execution is None:
            return
        if isinstance(message, Lost):
            if execution.is_resent and not execution.is_starting:
                # The second supervisor found the ports taken by the first.
                return
            execution.fail(NotConnected("the agent lost the command: it was killed, or its ports did not come"))
        elif execution.is_starting and message.errno != ESTALE:
            why = os.strerror(message.errno)
            execution.fail(NotSupported(f"the agent in the guest refused the command: {message.what}: {why}"))

    def _on_restart(self) -> None:
        """The agent may have been told of commands that are to start, or not. They are sent again: a command runs once
        at most, for only one supervisor can open its ports."""
        self._hotplug.tasks.start(self._send_again([each for each in self._running.values() if each.is_starting]))

    async def _send_again(self, executions: Sequence[Execution]) -> None:
        await self.agent.ready()
        for execution in executions:
            if execution.is_starting:
                execution.is_resent = True
                self._send(execution)

    def _on_event(self, event: Event) -> None:
        if reason := _INTERRUPTIONS.get(event.name):
            self._fail_all(reason)
            if event.name == "RESET":
                self.agent.restart()
                self._streams.unplug_at_once([each.plugged for each in self._running.values()])

    async def _until_end(self) -> None:
        try:
            self._end_reason = (await self._machine.wait()).message
        except NotConnected as error:
            self._end_reason = str(error)
        finally:
            self._fail_all(self._end_reason)

    async def ended(self) -> None:
        """Wait for the machine's end, and raise NotConnected."""
        await asyncio.wait({self._end})
        raise NotConnected(self._end_reason)

    def _fail_all(self, reason: str) -> None:
        for execution in tuple(self._running.values()):
            execution.fail(NotConnected(f"the command was ended: {reason}"))

    def close(self) -> None:
        """Let go of the agent and all commands."""
        self._is_closed = True
        for execution in tuple(self._running.values()):
            execution.close()
        self._streams.close()
        self.agent.close()


def _message(wanted: Wanted, id: str, session: str) -> Run:
    return Run(
        id,
        session,
        arguments=wanted.arguments,
        environment=wanted.environment,
        directory=wanted.directory,
        user=wanted.user,
        size=wanted.size,
        stdin=wanted.stdin,
    )
