# SPDX-License-Identifier: LGPL-2.1-or-later
"""Runs commands in the guest. Each command has virtio-serial ports for its streams.

In the guest, the agent forks a supervisor for each command. The supervisor starts the command and connects the command
to the ports. The client owns the streams: this process reads the status port only.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from errno import ESTALE, ETIMEDOUT
from typing import Any

from ..agent import protocol
from ..agent.protocol import (
    PORTS,
    STATUS,
    STDIN,
    TTY,
    Done,
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
from .hang_ups import HangUps, unread
from .ports import Ports
from .streams import PortSet, Streams

#: The maximum number of commands that run in one machine at once.
COMMANDS_MAX = 32

_RECEIVE_SIZE = 4096

#: Seconds to wait for the machine's end after a status port was closed, because the machine's end closes it too.
_END_TIMEOUT = 5.0

#: Seconds between two checks whether QEMU has read all of an input that has ended.
_INPUT_INTERVAL = 0.02

#: The number of attempts to start a command, each with other ports, if the guest does not open its ports.
_ATTEMPTS = 3

#: The end of a command.
Ended = Exited | Signalled | Failed

#: The events of QEMU that end all commands, and the reason to report for each.
_INTERRUPTIONS = {
    "RESET": "the guest was rebooted",
    "SUSPEND": "the guest was suspended",
    "SUSPEND_DISK": "the guest was suspended to its disk",
}


@dataclass(frozen=True, slots=True)
class Wanted:
    """A command that a client asks for. Without arguments, it is the user's login shell."""

    arguments: Sequence[bytes] = ()
    environment: Mapping[bytes, bytes] = field(default_factory=dict)
    directory: bytes | None = None
    user: bytes | None = None
    #: The terminal's rows and columns; None for a command with pipes.
    size: tuple[int, int] | None = None
    stdin: bool = True


class Execution:
    """A command on a set of ports. `close` must follow, which ends the command if it still runs."""

    def __init__(self, commands: Commands, id: str, ports: PortSet, wanted: Wanted) -> None:
        self._commands = commands
        #: The command's name in the agent's protocol.
        self.id = id
        self.ports = ports
        #: All streams of this command. The set of ports gets other streams for the next command.
        self._connected = dict(ports.streams)
        self.wanted = wanted
        #: `is_sent` is True once the command was sent to the agent, `is_resent` once it was sent again.
        self.is_sent = self.is_resent = False
        #: True if the command was not started because the guest did not open its ports.
        self.lacks_ports = False
        #: True as long as the command counts towards COMMANDS_MAX.
        self.is_counted = False
        self._reader = protocol.status_reader()
        self._loop = asyncio.get_running_loop()
        self._started: asyncio.Future[int] = self._loop.create_future()
        self._ended: asyncio.Future[Ended] = self._loop.create_future()
        for each in (self._started, self._ended):
            # Mark an exception as retrieved, because it is possible that no caller waits for it.
            each.add_done_callback(lambda future: future.cancelled() or future.exception())
        #: The client's ends of the streams by their names. The client closes them; so does `close`.
        self.streams = {name: self._connected[port].ours for name, port in _streams(wanted).items()}
        self._status = self._connected[STATUS].ours
        self._status.setblocking(False)
        self._loop.add_reader(self._status, self._on_readable)
        for stream in _streams(wanted).values():
            self._watch(stream)

    def _watch(self, stream: str) -> None:
        """Tell the agent when the client closes its end of a stream. The guest's kernel may miss QEMU's message."""
        theirs = self._connected[stream].theirs

        def on_hang_up() -> None:
            if stream == STDIN and unread(theirs):
                self._commands.tasks.start(self._report_end_of_input(theirs))
            else:
                self._commands.agent.send(protocol.close(self.id, stream))

        self._commands.hang_ups.watch(theirs, on_hang_up)

    async def _report_end_of_input(self, theirs: socket.socket) -> None:
        """Report the end of the input once QEMU has read all input, so that the guest gets the input first."""
        while theirs.fileno() >= 0 and unread(theirs):  # noqa: ASYNC110 - nothing reports that QEMU has read
            await asyncio.sleep(_INPUT_INTERVAL)
        if not self._ended.done():
            self._commands.agent.send(protocol.close(self.id, STDIN))

    async def started(self) -> int | None:
        """Wait until the command runs, and return its process id in the guest.

        Returns None if the command could not be started; `ended` then returns the reason. Raises NotConnected or
        NotSupported.
        """
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
        """Send a signal to the command's process group. Raises UsageError for an unknown signal."""
        self._commands.agent.send(protocol.signal(self.id, number))

    def fail(self, error: VmspawnError) -> None:
        """Raise an error in the callers that wait for the command, unless its end is known.

        Also close the manager's copies of QEMU's ends.
        """
        if not self._ended.done():
            self._ended.set_exception(error)
        self._stop_reading()
        self._close_far_ends()

    @property
    def is_starting(self) -> bool:
        """True until the agent has reported that the command runs, or has ended."""
        return not self._started.done() and not self._ended.done()

    def _on_readable(self) -> None:
        try:
            data = self._status.recv(_RECEIVE_SIZE)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._stop_reading()
            # If the machine is ending, `_until_end` fails the command before this call does.
            removed = NotConnected("the command's ports were removed", hint="another QMP client has removed them")
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
                # The client's next write fails.
                with contextlib.suppress(OSError):
                    self._connected[STDIN].theirs.shutdown(socket.SHUT_RDWR)
            case Exited() | Signalled() | Failed():
                self._ended.set_result(message)
                # Messages after the end are not read.
                self._stop_reading()
            case _:
                self._stop_reading()
                self.fail(NotConnected("the agent in the guest broke its protocol, so the command was ended"))

    def _stop_reading(self) -> None:
        if self._status.fileno() >= 0:
            self._loop.remove_reader(self._status)

    def _close_far_ends(self) -> None:
        """Close the manager's copies of QEMU's ends, so that the client notices when QEMU closes its ends."""
        for stream in self._connected.values():
            self._commands.hang_ups.forget(stream.theirs)
            stream.theirs.close()

    def close(self) -> None:
        """Close the streams, which kills the command if it still runs. May be called again."""
        is_over = self._ended.done() and self._ended.exception() is None
        self.fail(NotConnected("the command was ended"))
        self._commands.closed(self, is_over=is_over)


def _streams(wanted: Wanted) -> Mapping[str, str]:
    """Return the port of each stream of a command, without the status port."""
    if wanted.size is not None:
        return {TTY: STDIN}
    return {name: name for name in PORTS if name != STATUS and (wanted.stdin or name != STDIN)}


class Commands:
    """The commands of one machine."""

    def __init__(self, machine: Running) -> None:
        """Prepare to run commands. Raises NotSupported if the machine has no port for the agent."""
        self._machine = machine
        path = machine.directory.file(runtime.QEMU_AGENT)
        if not os.path.exists(path):
            raise NotSupported.with_fields(
                "machine {name} was started without a port for the agent: with {agent=no}, or by an older vmspawn",
                hint="restart the machine to run commands in it",
                name=machine.name,
            )
        self._hotplug = machine.hotplug
        self.tasks = self._hotplug.tasks
        self.hang_ups = HangUps()
        self.agent = Agent(self._connect, on_message=self._on_message, on_restart=self._on_restart)
        self._ports = Ports(self._hotplug, CONTROLLER, COMMAND_NUMBERS, machine.attachments)
        self._streams = Streams(self._ports, self.agent, self.tasks, len(COMMAND_NUMBERS) // len(PORTS))
        self._running: dict[str, Execution] = {}
        self._is_closed = False
        #: The ports of commands that the agent has not reported as over.
        self._unreleased: dict[str, PortSet] = {}
        #: Commands that run or are being started.
        self._count = 0
        self._numbers = itertools.count()
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

    async def settle(self, *, is_copy: bool) -> None:
        """Unplug the ports of another manager's commands, whose clients are gone. Raises Timeout or NotConnected.

        `is_copy` is True for a copy that was just started. A copy keeps the ports that no command uses.
        """
        await self._ports.settle()
        await self._streams.clear(self._ports, is_copy=is_copy)

    async def plug_ahead(self) -> None:
        """Wait for the agent, and plug in the ports for one command. Copies of the machine keep these ports.

        Raises the errors of `start`, except those about the command itself.
        """
        await self._agent_ready()
        await self._streams.plug_ahead()

    async def start(self, wanted: Wanted, *, timeout: float = COMMAND_START_TIMEOUT) -> Execution:
        """Start a command, and wait until it runs or fails to start. The caller closes the returned execution.

        Raises Timeout if the agent does not answer in time, NoFreePort if too many commands run, NotSupported,
        NotConnected, UsageError or QmpError.
        """
        if self._count >= COMMANDS_MAX:
            raise NoFreePort(
                f"{COMMANDS_MAX} commands run in machine {self._machine.name} already", hint="wait until one has ended"
            )
        # Raises UsageError for a command that the protocol cannot carry, before a port is plugged in.
        protocol.run(_message(wanted, "check", "check", "check"))
        self._count += 1
        try:
            async with asyncio.timeout(timeout):
                execution = await self._start(wanted)
        except BaseException as error:
            self._count -= 1
            if isinstance(error, TimeoutError):
                raise self._too_late(timeout) from None
            raise
        execution.is_counted = True
        return execution

    async def _start(self, wanted: Wanted) -> Execution:
        attempts = _ATTEMPTS
        while True:
            execution = await self._prepare(wanted)
            try:
                await self._agent_ready()
                self._send(execution)
                await execution.started()
                return execution
            except NotConnected:
                execution.close()
                attempts -= 1
                if not (execution.lacks_ports and attempts):
                    raise
            except BaseException:
                execution.close()
                raise

    async def _prepare(self, wanted: Wanted) -> Execution:
        await self._agent_ready()
        ports = await self._streams.take()
        if self._is_closed:
            ports.close()
            raise NotConnected(f"the command was not started: {self._end_reason}")
        execution = Execution(self, f"{ports.id}-{next(self._numbers)}", ports, wanted)
        self._running[execution.id] = execution
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
        late = f"the agent in machine {machine.name} did not answer within {timeout:g} s"
        if not machine.is_running:
            return Timeout(f"{late}: the machine is {machine.status}", hint=f"see: vmctl resume {machine.name}")
        return Timeout(
            late,
            hint="the guest may still be booting, or has no agent; to add the agent to an image, see: vmctl help agent",
        )

    def _send(self, execution: Execution) -> None:
        message = _message(execution.wanted, execution.id, self.agent.session, execution.ports.id)
        self._unreleased[execution.id] = execution.ports
        execution.is_sent = True
        self.agent.send(protocol.run(message))

    # Changes of commands.

    def closed(self, execution: Execution, *, is_over: bool) -> None:
        """Release the ports of a closed execution. `is_over` is True if the agent has reported the command's end."""
        if self._running.pop(execution.id, None) is None:
            return
        self._count -= execution.is_counted
        if self._is_closed:
            # QEMU ends with its ports, or another manager removes them.
            execution.ports.close()
            return
        if execution.is_sent and not is_over:
            self.agent.send(protocol.hang_up(execution.id))
        self._streams.replenish()
        self._streams.give_back(execution.ports, was_run=execution.is_sent)

    def resize(self, id: str, rows: int, columns: int) -> None:
        """Set the size of a command's terminal. Raises NotConnected if there is no such command."""
        self._find(id).resize(rows, columns)

    def signal(self, id: str, number: int) -> None:
        """Send a signal to a command. Raises NotConnected if there is no such command."""
        self._find(id).signal(number)

    def _find(self, id: str) -> Execution:
        if (execution := self._running.get(id)) is None:
            raise NotConnected(f"command {id} does not run")
        return execution

    def _on_message(self, message: Refused | Done | Lost) -> None:
        id = message.id or ""
        execution = self._running.get(id)
        is_starting = execution is not None and execution.is_starting
        if isinstance(message, Refused):
            if execution is None or not is_starting or message.errno == ESTALE:
                return
            self._on_refused(execution, message)
        elif isinstance(message, Lost) and execution is not None:
            if execution.is_resent and not is_starting:
                # The second supervisor ended, because the first one has the ports open.
                return
            execution.fail(NotConnected("the agent lost the command: its supervisor was killed"))
        if (ports := self._unreleased.pop(id, None)) is not None:
            ports.released.set()

    @staticmethod
    def _on_refused(execution: Execution, message: Refused) -> None:
        execution.lacks_ports = message.errno == ETIMEDOUT
        if execution.lacks_ports:
            execution.ports.is_spent = True
            execution.fail(NotConnected("the guest did not open the ports of the command"))
        else:
            why = os.strerror(message.errno)
            execution.fail(NotSupported(f"the agent in the guest refused the command: {message.what}: {why}"))

    def _on_restart(self) -> None:
        """Send again all commands that are being started, because the killed agent may not have read them.

        A command still runs at most once, because only one supervisor can open its ports.
        """
        self._streams.spend()
        self._unreleased.clear()
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
                self._unreleased.clear()
                self._streams.unplug_all()

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
        """End all commands, and close the connection to the agent."""
        self._is_closed = True
        for execution in tuple(self._running.values()):
            execution.close()
        self._streams.close()
        self.hang_ups.close()
        self.agent.close()


def _message(wanted: Wanted, id: str, session: str, ports: str) -> Run:
    return Run(
        id,
        session,
        ports,
        arguments=wanted.arguments,
        environment=wanted.environment,
        directory=wanted.directory,
        user=wanted.user,
        size=wanted.size,
        stdin=wanted.stdin,
    )
