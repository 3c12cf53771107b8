# SPDX-License-Identifier: LGPL-2.1-or-later
"""One run of a machine: QEMU, the control socket, the console and the signals, until it ends."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable

from ..aio.waiting import first_of
from ..boot.launch import END_SIGNALS, Launched
from ..console.interactive import Interactive
from ..console.messages import Voice
from ..console.viewers import OutputViewer, output_failed
from ..control.server import ControlServer, build_registry
from ..errors import ManagerFailed, VmspawnError
from ..host.limits import allow_descriptors
from ..host.notify import Notifier
from ..machine.ending import End
from ..machine.machine import Machine
from .keys import Keys
from .registration import Registered
from .shutdown import Shutdown

#: Ends of QEMU that somebody will want to look into.
_UNEXPECTED = ("qemu-died", "unknown")

#: Seconds that the last of the console's output has to be written.
_FLUSH_TIMEOUT = 5.0

#: Seconds that clients of the control socket have to take the machine's last event.
_FAREWELL_TIMEOUT = 1.0

_STDIN, _STDOUT = 0, 1


class Front:
    """What of the machine is on our own standard streams, as `--console=` says."""

    def __init__(self, machine: Machine, shutdown: Shutdown, voice: Voice) -> None:
        self._machine = machine
        self._voice = voice
        self._shutdown = shutdown
        self._keys: Keys | None = None
        self._interactive: Interactive | None = None
        self._output: OutputViewer | None = None
        self._resizing: asyncio.Task[None] | None = None
        #: Whether the terminal is known to be gone.
        self.hung_up = False
        #: Whether SIGHUP is still to come for what we have seen for ourselves.
        self.expects_hangup = False

    def open(self) -> None:
        """Show the console."""
        kind = self._machine.config.console
        if kind == "interactive":
            self._keys = Keys(self._machine, self._shutdown, self._voice.say)
            self._interactive = Interactive(
                self._machine.console,
                _STDIN,
                _STDOUT,
                pressed=self._keys.pressed,
                gone=self._terminal_gone,
                resized=self._resized,
                say=self._voice.say,
            )
            self._voice.divert(self._interactive.write_line)
        elif kind == "read-only":
            self._output = OutputViewer(
                self._machine.console, _STDOUT, failed=lambda error: self._voice.say(output_failed(error))
            )
            self._machine.console.attach(self._output)
        elif kind == "native":
            # QEMU has made the terminal raw.
            self._voice.divert(lambda line: print(f"\r{line}\r", file=sys.stderr, flush=True))

    def suspend(self) -> None:
        """SIGTSTP: stop as a job of the shell does, the terminal in order; the guest runs on without its manager."""
        if self._interactive is not None:
            self._interactive.suspend()
        handler = signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        # Stops us here, unless nobody is there who could continue us.
        os.kill(os.getpid(), signal.SIGTSTP)
        signal.signal(signal.SIGTSTP, handler)
        self.resume()

    def resume(self) -> None:
        """SIGCONT."""
        if self._interactive is not None:
            self._interactive.resume()

    def window_changed(self) -> None:
        """SIGWINCH."""
        if self._interactive is not None:
            self._interactive.window_changed()

    def close(self) -> None:
        """Leave the streams, and the terminal as it was. May be called again."""
        self._voice.divert(None)
        if self._keys is not None:
            self._keys.close()
        if self._resizing is not None:
            self._resizing.cancel()
        if self._interactive is not None:
            self._interactive.close()
        if self._output is not None:
            self._output.close()

    def _resized(self, rows: int, columns: int) -> None:
        if self._resizing is not None:
            self._resizing.cancel()
        self._resizing = asyncio.create_task(self._machine.window.resize(rows, columns))

    def _terminal_gone(self) -> None:
        # Under nohup(1) the machine is meant to go on.
        if not self.hung_up and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            self.hung_up = self.expects_hangup = True
            self._shutdown.request("the terminal is gone")


class Signals:
    """What each signal means to the manager; docs/console.md has the list."""

    def __init__(self, shutdown: Shutdown, front: Front) -> None:
        self._shutdown = shutdown
        self._front = front

    def listen(self) -> None:
        """Take over the signals, those included that came since they were blocked."""
        loop = asyncio.get_running_loop()
        for number in END_SIGNALS:
            # Whoever started us with a signal ignored, such as nohup(1) or a shell with `&`, means it.
            if signal.getsignal(number) is not signal.SIG_IGN:
                loop.add_signal_handler(number, self._end, number)
        loop.add_signal_handler(signal.SIGTSTP, self._front.suspend)
        loop.add_signal_handler(signal.SIGCONT, self._front.resume)
        loop.add_signal_handler(signal.SIGWINCH, self._front.window_changed)
        for number in (signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, END_SIGNALS)

    def _end(self, number: signal.Signals) -> None:
        name = signal.Signals(number).name
        if number == signal.SIGQUIT:
            self._shutdown.force(name)
        elif number == signal.SIGHUP and self._front.expects_hangup:
            self._front.expects_hangup = False
        else:
            self._front.hung_up |= number == signal.SIGHUP
            self._shutdown.request(name)


class Heartbeat:
    """Tells a service manager that asks for it (WatchdogSec=) that our event loop turns."""

    #: How often in the time after which the service manager gives us up.
    _BEATS = 3

    def __init__(self, notifier: Notifier) -> None:
        self._notifier = notifier
        self._next: asyncio.TimerHandle | None = None

    def begin(self) -> None:
        """Say it now, and again and again."""
        if self._notifier.watchdog:
            self._notifier.send(WATCHDOG=1)
            self._next = asyncio.get_running_loop().call_later(self._notifier.watchdog / self._BEATS, self.begin)

    def end(self) -> None:
        """Say no more."""
        if self._next is not None:
            self._next.cancel()


def _report(machine: Machine, end: End, notice: Callable[[str], None]) -> None:
    from .report import write_report

    if path := write_report(machine, end.message):
        notice(f"a report is in {path}")


async def _leave(machine: Machine, error: Exception) -> ManagerFailed:
    """Let go of a machine after a fault of ours, and say what becomes of it."""
    from .report import write_report

    what = f"the manager failed: {type(error).__name__}: {error}".splitlines()[0]
    report = write_report(machine, what, error)
    up = machine.is_up
    await machine.leave()
    becomes = f"the machine runs on, take it over with: vmctl adopt {machine.name}" if up else "the machine was ended"
    return ManagerFailed(f"{what}; {becomes}", hint=f"please report it, with {report}" if report else "")


async def supervise(launched: Launched, voice: Voice, *, ready: Callable[[], None] = lambda: None) -> End:
    """Run a machine that was just launched or adopted to its end, and say how it ended. Owns `launched`.

    `ready` is called once the machine is up. Raises StartError if QEMU does not come up.
    """
    allow_descriptors()
    machine = Machine(launched.config)
    machine.warn = voice.say
    try:
        machine.open(launched)
    except BaseException:
        launched.abandon()
        raise
    notifier = Notifier()
    heartbeat = Heartbeat(notifier)
    shutdown = Shutdown(machine, voice.notice, notifier)
    front = Front(machine, shutdown, voice)
    server: ControlServer | None = None
    registered = Registered(machine, voice.notice)
    try:
        server = ControlServer(machine.directory, build_registry(machine), failed=machine.failed)
        Signals(shutdown, front).listen()
        await machine.started()
        for note in machine.adoption_notes:
            voice.notice(note)
        await registered.begin()
        ready()
        voice.notice(f"machine {machine.name} is running; see: vmctl status {machine.name}")
        front.open()
        notifier.send(READY=1, STATUS=f"Machine {machine.name} is running", X_VMSPAWN_LEADER_PID=machine.pid)
        heartbeat.begin()
        end = await machine.wait()
        notifier.send(STOPPING=1, STATUS=end.message[:1].upper() + end.message[1:])
        if machine.config.console != "native":
            await first_of(machine.console.ended, timeout=_FLUSH_TIMEOUT)
        await server.finish(timeout=_FAREWELL_TIMEOUT)
        if end.reason in _UNEXPECTED:
            _report(machine, end, voice.notice)
        return end
    except VmspawnError:
        wanted = machine.was_terminated and not machine.is_up
        await machine.leave()
        if wanted:
            return End.terminated()
        raise
    except Exception as error:
        # Whatever goes wrong with the manager, the guest runs on, and another one can take it over.
        raise await _leave(machine, error) from error
    finally:
        shutdown.close()
        front.close()
        await registered.end()
        await machine.close()
        # Last of all: whoever waits for the end of a connection finds nothing left of the machine.
        if server is not None:
            server.close()
        heartbeat.end()
