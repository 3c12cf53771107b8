# SPDX-License-Identifier: LGPL-2.1-or-later
"""A machine: a QEMU with its guest, and what one can do to it while it runs."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any

from ..aio.waiting import first_of
from ..boot.config import MachineConfig, check
from ..boot.launch import Launched, explain_failure, launch
from ..boot.state import SavedQemu, StateFile, damaged
from ..console.hub import Console
from ..errors import NotConnected, NotSupported, StartError
from ..helpers.watch import Watch
from ..host import runtime
from ..host.process import Process
from ..qmp.monitor import GREETING_TIMEOUT, Monitor
from ..qmp.run_state import RunState
from ..qmp.transcript import Transcript
from ..storage.attached_disk import AttachedDisk
from ..storage.hotplug import Storage
from .console_size import Window
from .disks import Disks
from .ending import End, MachineEvents
from .open_console import open_console
from .quit import QUIT_TIMEOUT, Quit
from .recent_events import Diary
from .sessions import Sessions

if TYPE_CHECKING:
    from ..qmp.share.multiplexer import Multiplexer
    from ..qmp.share.session import Session

#: Seconds for the greeting of a QEMU that was up before. It comes at once, unless another program holds the monitor, or
#: QEMU waits for the host's storage.
ADOPT_GREETING_TIMEOUT = 5.0

#: Seconds that QEMU has to end after it closed its monitor.
_EXIT_TIMEOUT = 10.0


class Machine(Disks):
    """A virtual machine.

    `async with Machine(guest="builtin") as machine:` starts it, and ends it on the way out if it still runs. The
    keyword arguments are the fields of MachineConfig. Raises StartError or UsageError if it cannot be started.
    """

    def __init__(self, config: MachineConfig | None = None, **options: Any) -> None:
        self.config = check((config or MachineConfig())._replace(**options))
        self._launched: Launched | None = None
        self._process: Process | None = None
        self._monitor: Monitor | None = None
        self._run_state: RunState | None = None
        self._storage: Storage | None = None
        self._sessions: Sessions | None = None
        self._transcript: Transcript | None = None
        #: What happened to it of late.
        self.diary: Diary | None = None
        self._up = False
        #: Whether `terminate` was called.
        self.was_terminated = False
        self._quit: Quit | None = None
        self._state_file: StateFile | None = None
        self._watch = Watch(())
        self._closing = False
        self._ended: End | None = None
        self._console: Console | None = None
        self._window: Window | None = None
        #: Called with a line that somebody should hear; `Describe` has it as the last error too.
        self.warn: Callable[[str], None] = lambda line: None
        #: What was found when the machine was taken over from a manager that died, for people.
        self.adoption_notes: list[str] = []

    # Starting and ending.

    async def __aenter__(self) -> Machine:
        self.open(launch(self.config))
        await self.started()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def open(self, launched: Launched) -> None:
        """Take over a QEMU that was just launched or adopted; `started` waits until it is up, `close` must follow."""
        if self.config.qmp_log:
            self._transcript = Transcript(self.config.qmp_log)
        self._launched = launched
        self._process = Process(launched.pid)
        self._monitor = Monitor(launched.sockets.pop("qmp-manager"), transcript=self._transcript, name="manager")
        self._quit = Quit(self._process, self._monitor)
        self._state_file = self._open_state_file(launched, self._process)
        self.diary = Diary(self._monitor)
        self._run_state = RunState(self._monitor)
        self._storage = Storage(self._monitor, self._run_state, launched.layout, journal=self._save_state)
        saved = launched.saved
        self._sessions = Sessions(launched.sockets, saved and saved.sessions, self._save_state, self._transcript)
        if saved is not None:
            try:
                self._storage.load(saved.storage)
            except (KeyError, TypeError, ValueError) as error:
                raise damaged(self.directory, error) from None
        for each in launched.boot_disks:
            self._storage.add_boot_disk(
                AttachedDisk(
                    each.disk, each.identifiers, each.place, each.serial, [*each.images], limits=each.disk.limits
                )
            )
        self._watch = Watch(launched.additions.helpers)
        port = launched.sockets.pop(runtime.QEMU_SIZE, None)
        self._window = Window(self.monitor, port, ask_qemu=self.config.console_transport == "virtio")
        self._console = open_console(launched, self._log_failed)
        self._save_state()

    def _log_failed(self, error: OSError) -> None:
        line = f"cannot write {self.config.console_log}: {error.strerror}; the machine goes on without"
        self.failed(line)
        self.warn(line)

    async def started(self) -> None:
        """Wait until QEMU is up. Raises StartError in QEMU's words if it does not come up; nothing is left then.

        A QEMU that was adopted runs on, whatever goes wrong.
        """
        try:
            adopting = self._launched is not None and self._launched.saved is not None
            await self.monitor.start(timeout=ADOPT_GREETING_TIMEOUT if adopting else GREETING_TIMEOUT)
            assert self._run_state is not None
            await self._run_state.start()
            await self._settle()
        except BaseException as error:  # noqa: BLE001 - whatever it is, it is raised again
            raise await self._failed_start(error) from None
        self._up = True

    async def _settle(self) -> None:
        """Let go of what was only needed on the way here."""
        assert self._launched is not None
        assert self._sessions is not None
        if self._launched.saved is None:
            await self.storage.release_boot_descriptors()
            found = await self.monitor.execute("query-fdsets")
            self._sessions.foreign_fdsets = tuple(each["fdset-id"] for each in found if each["fds"])
            self._save_state()
            return
        await self._sessions.close_what_was_left()
        self.adoption_notes = await self.storage.reconcile(self._sessions.foreign_fdsets)

    async def _failed_start(self, error: BaseException) -> BaseException:
        """Clean up after a start that failed, and say why in the words of QEMU if it died."""
        assert self._launched is not None
        if self._launched.saved is not None and self._process is not None and not self._process.ended.is_set():
            await self.leave()
            return error
        if isinstance(error, NotConnected) and self._process is not None:
            await first_of(self._process.ended, timeout=QUIT_TIMEOUT)
            end = self._process.describe_end()
            failed = self._watch.failed()
            error = StartError(failed) if failed else explain_failure(self._launched, end, self._log())
        await self.close()
        return error

    async def give_up(self) -> None:
        """A start that fails once QEMU is up: end what was started, let go of what was adopted."""
        if self._launched is not None and self._launched.saved is not None:
            await self.leave()
        else:
            await self.close()

    async def leave(self) -> None:
        """Let go of the machine, which runs on for another manager to adopt. One that is not up yet is ended."""
        launched = self._launched
        if launched is None or (not self._up and launched.saved is None):
            await self.close()
            return
        # From here on nothing is written down: what tasks do as they are cancelled must not look like what was done.
        self._launched = None
        await self._close_connections()
        if self._process is not None:
            self._process.close()
        self._watch.leave()
        launched.leave()

    async def _close_connections(self) -> None:
        if self._console is not None:
            self._console.close()
        if self._window is not None:
            self._window.close()
        if self._storage is not None:
            self._storage.close()
        if self._monitor is not None:
            self._monitor.close("the machine ended")
        if self._sessions is not None:
            await self._sessions.close()
        if self._transcript is not None:
            self._transcript.close()
        if self._quit is not None:
            self._quit.close()

    async def close(self) -> None:
        """End the machine if it runs, at once, and leave nothing behind. May be called again."""
        launched = self._launched
        if launched is None or self._closing:
            return
        self._closing = True
        if self._process is not None:
            if not self._process.ended.is_set():
                assert self._quit is not None
                await self._quit.ask()
                await self._process.ended.wait()
            launched.pid = 0
            await self.wait()
        self._launched = None
        await self._close_connections()
        await self._watch.close()
        launched.abandon()

    def _log(self) -> str:
        """What QEMU printed."""
        return self._launched.directory.read_log() if self._launched and self._launched.directory else ""

    async def wait(self) -> End:
        """Wait until QEMU has ended, and say how."""
        process = self._running_process()
        lost = await self._watch.until_ended(process, self.terminate)
        if lost:
            return End("helper-died", lost, False)
        # What QEMU said before it went may still lie in the socket.
        if self._monitor is not None:
            await first_of(self._monitor.closed, timeout=_EXIT_TIMEOUT)
        self._ended = self._ended or self._end(process)
        return self._ended

    def _end(self, process: Process) -> End:
        cause = self._run_state.shutdown_reason if self._run_state else ""
        killed = self._quit is not None and self._quit.killed
        return End.of(process, cause, killed=killed, log=self._log())

    # What it is.

    @property
    def name(self) -> str:
        """The machine's name."""
        return self.config.name or ""

    @property
    def directory(self) -> runtime.MachineDirectory:
        """The machine's runtime directory."""
        if self._launched is None or self._launched.directory is None:
            raise NotConnected("the machine does not run")
        return self._launched.directory

    @property
    def is_up(self) -> bool:
        """Whether it has started: from then on it outlives its manager."""
        return self._up

    @property
    def pid(self) -> int:
        """QEMU's process id."""
        return self._running_process().pid

    @property
    def uptime(self) -> float:
        """Seconds since QEMU was started, whoever did that."""
        return runtime.age(self._running_process().started)

    @property
    def qemu_version(self) -> str:
        """QEMU's version."""
        assert self._launched is not None
        return ".".join(map(str, self._launched.binary.version))

    @property
    def accelerator(self) -> str:
        """`kvm` or `tcg`."""
        assert self._launched is not None
        return self._launched.accelerator

    @property
    def status(self) -> str:
        """QEMU's run state, such as `running` or `paused`; known without asking QEMU."""
        return self._run_state.status if self._run_state else "prelaunch"

    @property
    def running(self) -> bool:
        """Whether the guest's processors run."""
        return self._run_state is not None and self._run_state.running

    @property
    def monitor(self) -> Monitor:
        """The manager's own QMP connection."""
        if self._monitor is None:
            raise NotConnected("the machine does not run")
        return self._monitor

    @property
    def storage(self) -> Storage:
        """The machine's disks."""
        if self._storage is None:
            raise NotConnected("the machine does not run")
        return self._storage

    def _running_process(self) -> Process:
        if self._process is None:
            raise NotConnected("the machine does not run")
        return self._process

    @property
    def console(self) -> Console:
        """The guest's console. Raises NotSupported where it belongs to QEMU (`native`)."""
        if self._console is None:
            raise NotSupported("the console of this machine is QEMU's own (--console=native)")
        return self._console

    @property
    def window(self) -> Window:
        """The window of the guest's console."""
        if self._window is None:
            raise NotConnected("the machine does not run")
        return self._window

    # What one can do to it.

    async def multiplexer(self) -> Multiplexer:
        """What shares QEMU among QMP clients; started when it is first asked for.

        Raises NotConnected if the machine does not run, Timeout if QEMU does not greet. A start that failed is final,
        for its connections to QEMU are gone: all who ask later are told the same.
        """
        if self._launched is None or self._sessions is None:
            raise NotConnected("the machine does not run")
        return await self._sessions.multiplexer()

    @property
    def sessions(self) -> tuple[Session, ...]:
        """The QMP clients that are connected."""
        return self._sessions.open if self._sessions else ()

    @contextlib.asynccontextmanager
    async def qmp(self, *, read_only: bool = False) -> AsyncIterator[Monitor]:
        """A QMP connection of your own: `async with machine.qmp() as qmp: await qmp.execute("query-block")`."""
        multiplexer = await self.multiplexer()
        ours, theirs = socket.socketpair()
        client = Monitor(theirs)
        try:
            multiplexer.open(ours, read_only=read_only)
            await client.start()
            yield client
        finally:
            client.close()

    def failed(self, what: str) -> None:
        """Somebody asked for something that failed: it is remembered for those who look at the machine."""
        if self.diary is not None:
            self.diary.failed(what)

    def events(self) -> MachineEvents:
        """The events from now on, QEMU's and ours: `with machine.events() as events: async for event in events:`."""
        return MachineEvents(self.monitor.events(), self.wait)

    async def power_off(self) -> None:
        """Press the power button (ACPI); the guest decides what follows. `wait` tells when it is off."""
        await self.monitor.execute("system_powerdown")

    async def reboot(self) -> None:
        """Reset the machine, as its reset button does."""
        await self.monitor.execute("system_reset")

    async def pause(self) -> None:
        """Stop the guest's processors."""
        await self.monitor.execute("stop")

    async def resume(self) -> None:
        """Let the guest's processors run on."""
        await self.monitor.execute("cont")

    async def terminate(self) -> None:
        """End QEMU without asking the guest; returns once QEMU has agreed. One that does not go is killed."""
        if self._quit is None:
            raise NotConnected("the machine does not run")
        self.was_terminated = True
        await self._quit.ask()

    # Its state on disk.

    def _open_state_file(self, launched: Launched, process: Process) -> StateFile:
        qemu = SavedQemu(process.pid, process.started, launched.accelerator)
        return StateFile(self.directory, self.config, launched.binary, qemu, launched.additions.helpers)

    def _save_state(self) -> None:
        # Whoever has let go of the machine writes nothing down any more.
        if self._launched is None or self._launched.directory is None:
            return
        assert self._state_file is not None
        assert self._storage is not None
        assert self._sessions is not None
        self._state_file.write(self._storage.state_text(), self._sessions.saved)
