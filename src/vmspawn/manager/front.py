# SPDX-License-Identifier: LGPL-2.1-or-later
"""Shows the machine's console on vmspawn's terminal or standard output."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from typing import TYPE_CHECKING

from ..console.messages import Messages
from ..console.viewers import OutputViewer, output_failed
from ..machine.running import Running
from .shutdown import Shutdown

if TYPE_CHECKING:
    from ..console.interactive import Interactive
    from .keys import Keys

_STDIN, _STDOUT = 0, 1


class Front:
    """The machine's console on vmspawn's standard streams, as `--console=` specifies."""

    def __init__(self, machine: Running, shutdown: Shutdown, messages: Messages) -> None:
        self._machine = machine
        self._messages = messages
        self._shutdown = shutdown
        self._keys: Keys | None = None
        self._interactive: Interactive | None = None
        self._output: OutputViewer | None = None
        self._resizing: asyncio.Task[None] | None = None
        #: True if the terminal has hung up.
        self.has_hung_up = False
        #: True after a hang-up was detected, until its SIGHUP arrives.
        self.expects_hangup = False

    def open(self) -> None:
        """Show the console."""
        kind = self._machine.config.console
        if kind == "interactive":
            # Most managers have no terminal, and use less memory without these modules.
            from ..console.interactive import Interactive
            from .keys import Keys

            self._keys = Keys(self._machine, self._shutdown, self._messages.report)
            self._interactive = Interactive(
                self._machine.console,
                _STDIN,
                _STDOUT,
                on_key=self._keys.pressed,
                on_terminal_gone=self._terminal_gone,
                on_resize=self._resized,
                report=self._messages.report,
            )
            self._messages.redirect(self._interactive.write_line)
        elif kind == "read-only":
            self._output = OutputViewer(
                self._machine.console, _STDOUT, on_failed=lambda error: self._messages.report(output_failed(error))
            )
            self._machine.console.attach(self._output)
        elif kind == "native":
            # QEMU has made the terminal raw.
            self._messages.redirect(lambda line: print(f"\r{line}\r", file=sys.stderr, flush=True))

    def suspend(self) -> None:
        """Handle SIGTSTP: restore the terminal and stop, as a job of the shell. The guest continues."""
        if self._interactive is not None:
            self._interactive.suspend()
        handler = signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        # The process stops here, unless its process group is orphaned: the kernel ignores SIGTSTP then.
        os.kill(os.getpid(), signal.SIGTSTP)
        signal.signal(signal.SIGTSTP, handler)
        self.resume()

    def resume(self) -> None:
        """Handle SIGCONT."""
        if self._interactive is not None:
            self._interactive.resume()

    def window_changed(self) -> None:
        """Handle SIGWINCH."""
        if self._interactive is not None:
            self._interactive.window_changed()

    def close(self) -> None:
        """Stop using the streams, and restore the terminal. May be called again."""
        self._messages.redirect(None)
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
        # Under nohup(1) the machine must continue.
        if not self.has_hung_up and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            self.has_hung_up = self.expects_hangup = True
            self._shutdown.request("the terminal is gone")
