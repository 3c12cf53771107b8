# SPDX-License-Identifier: LGPL-2.1-or-later
"""Represents a running machine: a QEMU with its guest, managed by this process."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from ..aio.tasks import Tasks
from ..aio.waiting import first_of
from ..boot.config import MachineConfig
from ..boot.diagnose import explain_failure, no_answer
from ..boot.qemu import QemuBinary
from ..boot.started import Incoming, Launched, Started
from ..boot.state import Fork, SavedQemu, damaged, open_journal
from ..console.hub import Console
from ..errors import NotConnected, NotSupported, StartError, Timeout, VmspawnError
from ..helpers.watch import Watch
from ..host import runtime
from ..host.process import Process
from ..hotplug.hotplug import Hotplug
from ..hotplug.journal import Journal
from ..network.forwards import Forwards
from ..qmp.monitor import Monitor
from ..qmp.run_state import RunState
from ..qmp.saving import Saving
from ..qmp.transcript import Transcript
from ..storage.attach import Storage
from .console_size import Window
from .ending import BY_WATCHER, End, MachineEvents
from .guest_failure import GuestFailure
from .open_console import open_console
from .origins import origin_of
from .power import Power
from .quit import QUIT_TIMEOUT, Quit
from .recent_events import RecentEvents
from .sessions import Sessions
from .time_limit import TimeLimit

if TYPE_CHECKING:
    from ..qmp.share.multiplexer import Multiplexer
    from ..qmp.share.session import Session

#: Seconds within which QEMU must report its run state; fewer than LIST_TIMEOUT, for which `vmctl list` waits.
_STATUS_TIMEOUT = 1.0

#: Seconds within which QEMU must end after it closed its monitor.
_EXIT_TIMEOUT = 10.0

#: Seconds in which slow viewers can read the last output, which may contain the message of a panic.
_DRAIN_TIMEOUT = 1.0


def _ignore(_line: str) -> None:
    pass


async def run(
    started: Started, *, warn: Callable[[str], None] = _ignore, notice: Callable[[str], None] = _ignore
) -> Running:
    """Manage a QEMU that was launched or adopted; returns once it is up. Takes ownership of `started`.

    `warn` gets each warning while the machine runs, and `notice` gets each message about an adoption. Raises StartError
    (with QEMU's message if QEMU has ended), Timeout, QmpError or SystemFailure. After an error, a launched QEMU has
    ended and has left nothing, and an adopted QEMU continues.
    """
    try:
        running = Running(started, warn)
    except BaseException:
        started.give_up()
        raise
    try:
        for line in await running._settle():
            notice(line)
        running._is_up.set()
    except BaseException as error:  # noqa: BLE001 - whatever it is, it is raised again
        raise await running._failed_start(error) from None
    return running


class Running:
    """A running machine. `run` makes one; `leave` or `end` must follow."""

    def __init__(self, started: Started, warn: Callable[[str], None]) -> None:
        self._started = started
        self._warn = warn
        #: True once this manager has begun to leave or to end the machine. The manager then writes no more state.
        self._is_done = False
        self._origin = origin_of(started)
        with ExitStack() as undo:
            self.config: MachineConfig = started.config
            self._transcript = Transcript(self.config.qmp_log) if self.config.qmp_log else None
            if self._transcript is not None:
                undo.callback(self._transcript.close)
            self._process = Process(started.pid)
            undo.callback(self._process.close)
            #: The manager's own QMP connection.
            self.monitor = Monitor(started.monitors.manager, transcript=self._transcript, name="manager")
            undo.callback(self.monitor.close, "the start failed")
            self._quit = Quit(self._process, self.monitor)
            #: The machine's last events.
            self.recent_events = RecentEvents(self.monitor)
            self._run_state = RunState(self.monitor)
            #: Pauses, resumes, resets and powers off the machine.
            self.power = Power(self.monitor, self._run_state)
            qemu = SavedQemu(started.pid, self._process.started, started.accelerator)
            self._journal = open_journal(
                self.directory, self.config, started.binary, qemu, started.helpers, started.fork
            )
            if self._origin.loading is not None:
                self._journal.add_section("loading", self._origin.loading.to_json)
            saving = Saving()
            self._sessions = self._open_sessions(saving)
            #: The devices that are plugged into the machine.
            self.hotplug = Hotplug(self.monitor, self._run_state, self._journal, saving)
            #: The machine's disks.
            self.storage = self._open_storage()
            #: The ports of the host that are forwarded to the guest.
            self.forwards = Forwards(self.monitor, self.name)
            self._watch = Watch(started.helpers)
            undo.callback(self._watch.leave)
            #: The window of the guest's console.
            self.window = Window(self.monitor, started.size_port, ask_qemu=self.config.console_transport == "virtio")
            self._console = open_console(started, self._origin, self._on_log_failed)
            if self._console is not None:
                undo.callback(self._console.close)
            self._guest_failure = GuestFailure(self.monitor, self._report)
            undo.callback(self._guest_failure.close)
            self._watch_guest()
            self._is_up = asyncio.Event()
            self._time_limit = TimeLimit(self.config.time_limit, self.uptime, self._terminate_once_up)
            undo.callback(self._time_limit.close)
            self._journal.write()
            self._end = asyncio.create_task(self._until_end())
            undo.pop_all()

    def _open_sessions(self, saving: Saving) -> Sessions:
        return Sessions(
            self._started.monitors,
            self._origin.sessions,
            self._journal,
            self._transcript,
            directory=self.directory,
            pid=self.pid,
            saving=saving,
        )

    def _open_storage(self) -> Storage:
        origin = self._origin
        try:
            return Storage(self.hotplug, self._started.layout, boot_disks=origin.boot_disks, saved=origin.attachments)
        except (KeyError, TypeError, ValueError) as error:
            raise damaged(self.directory, error) from None

    def _watch_guest(self) -> None:
        if self._console is None:
            return
        output = self._guest_failure.watch_console(self._console)
        origin, config = self._started.origin, self.config
        is_bios_boot = isinstance(origin, Launched) and origin.is_bios_boot
        if is_bios_boot and config.image and config.image_disk_type != "scsi-cd":
            self._guest_failure.watch_image(output, config.image, config.image_format or "raw")

    # Starting.

    async def _settle(self) -> list[str]:
        try:
            await self.monitor.greeting(timeout=self._origin.greeting_timeout)
        except Timeout as error:
            raise self._silent(error) from None
        await self._run_state.known()
        notes = await self._origin.settle(self.monitor, self.storage, self._sessions)
        if self._journal.section("loading") is not None:
            self._journal.add_section("loading", lambda: "null")
        self._journal.write()
        # The configuration of an adopted machine has no forwards, because QEMU keeps them.
        for each in self.config.forwards:
            made = await self.forwards.add(each)
            notes.append(f"{made.host}{made.suffix} is forwarded to port {made.guest_port} of the guest")
        return notes

    def _silent(self, error: Timeout) -> VmspawnError:
        """Return the error for a QEMU that sends no greeting, with the state of its process if that is the reason."""
        trouble = runtime.process_trouble(self.pid)
        return no_answer(self.name, self.pid, trouble) if trouble else error

    async def _failed_start(self, error: BaseException) -> BaseException:
        """Clean up after a failed start. Returns the reason, with QEMU's message if QEMU has ended."""
        if self._origin.lives_on and not self._process.ended.is_set():
            await self.leave()
            return error
        if isinstance(error, NotConnected):
            await first_of(self._process.ended, timeout=QUIT_TIMEOUT)
            error = self._explain()
        # QEMU may not have sent its greeting yet, and would not read `quit`. The guest has no data yet to lose.
        self._process.kill()
        await self.end()
        return error

    def _explain(self) -> StartError:
        if failed := BY_WATCHER.get(self.directory.read_ended()) or self._watch.failed():
            return StartError(failed)
        origin = self._started.origin
        disks = origin.disks if isinstance(origin, Launched) else ()
        return explain_failure(self.name, disks, self._process.describe_end(), self.directory.read_log())

    def _on_log_failed(self, error: OSError) -> None:
        line = f"cannot write {self.config.console_log}: {error.strerror}; the machine continues without it"
        self._report(line)

    def _report(self, line: str) -> None:
        self.failed(line)
        self._warn(line)

    # Ending.

    async def leave(self) -> None:
        """Leave the machine running, for another manager to adopt. May be called again, and after `end`."""
        if self._is_done:
            return
        # The journal must not record the steps of tasks that are being cancelled.
        self._is_done = True
        self._journal.close()
        self._end.cancel()
        await self._close_connections()
        self._process.close()
        self._watch.leave()
        self._started.leave()

    async def end(self) -> None:
        """End the machine at once if it runs, and leave nothing behind. May be called again, and after `leave`."""
        if self._is_done:
            return
        self._is_done = True
        self._journal.close()
        if not self._process.ended.is_set():
            await self._quit.ask()
            await self._process.ended.wait()
        await self.wait()
        await self._close_connections()
        await self._watch.close()
        self._started.end()

    async def _terminate_once_up(self) -> None:
        """Terminate the machine after its start has completed, because a start would report QEMU's end as a failure."""
        await first_of(self._is_up, self._process.ended)
        await self.terminate()

    async def give_up(self) -> None:
        """Undo a start that failed late: end a launched machine, and leave an adopted one running."""
        await (self.leave() if self._origin.lives_on else self.end())

    async def _close_connections(self) -> None:
        self._time_limit.close()
        self._guest_failure.close()
        if self._console is not None:
            self._console.close()
        self.window.close()
        self.hotplug.close()
        self.monitor.close("the machine ended")
        await self._sessions.close()
        if self._transcript is not None:
            self._transcript.close()
        self._quit.close()

    async def wait(self) -> End:
        """Wait for the machine's end, and return it. Raises NotConnected if this manager leaves the machine first."""
        await asyncio.wait({self._end})
        return Tasks.result(self._end)

    async def _until_end(self) -> End:
        terminate = self._terminate_once_up if self._origin.lives_on else self.terminate
        lost = await self._watch.until_ended(self._process, terminate)
        if lost:
            return End("helper-died", lost, False)
        # QEMU's last messages may still be unread in the socket.
        await first_of(self.monitor.closed, timeout=_EXIT_TIMEOUT)
        cause, log = self._run_state.shutdown_reason, self.directory.read_log()
        if not cause and self._quit.has_asked and self._process.status == 0:
            # QEMU's last event is lost if QEMU cannot write it at once.
            cause = "host-qmp-quit"
        if self._console is not None and cause != "guest-shutdown":
            await first_of(self._console.drained, timeout=_DRAIN_TIMEOUT)
        by_watcher = self.directory.read_ended()
        end = End.of(self._process, cause, killed=self._quit.has_killed, by_watcher=by_watcher, log=log)
        limit = self._time_limit
        return end.after(panic=self._guest_failure.panic, limit=limit.seconds if limit.is_over else None)

    # Properties.

    @property
    def name(self) -> str:
        """The machine's name."""
        return self.config.name or ""

    @property
    def has_lost_helper(self) -> bool:
        """True if a helper of an adopted machine ended while there was no manager. Such a machine is being ended."""
        return bool(self._watch.lost)

    @property
    def has_ended(self) -> bool:
        """True if QEMU has ended."""
        return self._process.ended.is_set()

    @property
    def directory(self) -> runtime.MachineDirectory:
        """The machine's runtime directory."""
        return self._started.directory

    @property
    def pid(self) -> int:
        """QEMU's process id."""
        return self._process.pid

    @property
    def helper_pids(self) -> list[int]:
        """The process ids of the helpers, as long as they run."""
        return [helper.pid for helper in self._started.helpers if helper.pid]

    @property
    def attachments(self) -> Mapping[str, Mapping[str, Any]]:
        """The sections of another manager's journal, by the kind of attachment."""
        return self._origin.attachments

    @property
    def uptime(self) -> float:
        """Return the seconds since the start of QEMU, which an earlier manager may have started."""
        return runtime.age(self._process.started)

    @property
    def qemu_version(self) -> str:
        """QEMU's version."""
        return ".".join(map(str, self._started.binary.version))

    @property
    def accelerator(self) -> str:
        """`kvm` or `tcg`."""
        return self._started.accelerator

    @property
    def status(self) -> str:
        """QEMU's run state, such as `running` or `paused`, as far as it is known without asking QEMU."""
        return self._run_state.status

    async def ask_status(self) -> bool:
        """Ask QEMU for its run state. Returns False if QEMU does not answer; `status` is then the last known state."""
        try:
            await self._run_state.ask(timeout=_STATUS_TIMEOUT)
        except (Timeout, NotConnected):
            return False
        return True

    @property
    def is_running(self) -> bool:
        """True if the guest's processors run."""
        return self._run_state.is_running

    @property
    def guest_failure(self) -> str:
        """The reason why the guest fails: its kernel panicked, or it resets in a loop. Empty without a failure."""
        return self._guest_failure.reason

    @property
    def guest_failed(self) -> asyncio.Event:
        """Set after the guest's first failure; not cleared if the guest recovers."""
        return self._guest_failure.seen

    @property
    def console(self) -> Console:
        """The guest's console. Raises NotSupported if it belongs to QEMU (`native`)."""
        if self._console is None:
            raise NotSupported.with_fields("the console of this machine is QEMU's own ({console=native})")
        return self._console

    # Actions.

    async def multiplexer(self) -> Multiplexer:
        """Return the multiplexer, which shares QEMU among QMP clients. The first call starts it.

        Raises Timeout if QEMU sends no greeting, NotConnected if QEMU has ended or this manager has left the machine.
        """
        if self._is_done:
            raise NotConnected(f"machine {self.name} does not run")
        return await self._sessions.multiplexer()

    @property
    def sessions(self) -> tuple[Session, ...]:
        """The QMP clients that are connected."""
        return self._sessions.open

    @contextlib.asynccontextmanager
    async def qmp(self, *, read_only: bool = False) -> AsyncIterator[Monitor]:
        """Open a QMP connection: `async with running.qmp() as qmp: await qmp.execute("query-block")`."""
        multiplexer = await self.multiplexer()
        ours, theirs = socket.socketpair()
        client = Monitor(theirs)
        try:
            multiplexer.open(ours, read_only=read_only)
            await client.greeting()
            yield client
        finally:
            client.close()

    @contextlib.asynccontextmanager
    async def held(self, *, timeout: float) -> AsyncIterator[None]:
        """Let only the calling task's commands reach QEMU; all other commands wait.

        Raises Timeout if the running commands and changes do not end within `timeout` seconds.
        """
        async with self.hotplug.gate.alone(timeout=timeout), self._sessions.held():
            with self.monitor.held():
                yield

    @property
    def journal(self) -> Journal:
        """The writer of state.json."""
        return self._journal

    @property
    def run_state(self) -> RunState:
        """QEMU's run state."""
        return self._run_state

    @property
    def fork(self) -> Fork | None:
        """The snapshot that the machine was started from, or None if the machine is not a copy."""
        return self._started.fork

    @property
    def incoming(self) -> Incoming | None:
        """The saved state that this process has started the machine from."""
        origin = self._started.origin
        return origin.incoming if isinstance(origin, Launched) else None

    @property
    def binary(self) -> QemuBinary:
        """The QEMU that runs."""
        return self._started.binary

    def failed(self, what: str) -> None:
        """Record that a request failed, for `vmctl status`."""
        self.recent_events.failed(what)

    def events(self) -> MachineEvents:
        """Return the events of QEMU and vmspawn from now on.

        with running.events() as events:
            async for event in events:
        """
        return MachineEvents(self.monitor.events(), self.wait)

    async def terminate(self) -> None:
        """End QEMU without asking the guest; returns when QEMU has accepted. A QEMU that does not exit is killed."""
        await self._quit.ask()
