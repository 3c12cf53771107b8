# SPDX-License-Identifier: LGPL-2.1-or-later
"""Runs the commands in the guest that `vmctl copy` needs, with sockets for their streams."""

from __future__ import annotations

import base64
import contextlib
from collections.abc import Sequence

from ...control.client import Client
from ...errors import CommandFailed, NotConnected, Timeout
from ...inside.copying import Ended, hang_up
from ...timeouts import FOREVER, REPLY_GRACE
from ..disconnect import watching
from .execute_replies import exit_status, take_streams
from .replies import MACHINE


class GuestProcess:
    """A command that runs in the guest. The caller must call `close`, which ends the command."""

    def __init__(self, machine: str, arguments: Sequence[bytes], *, stdin: bool, timeout: float) -> None:
        """Start a command.

        Raises CommandFailed if the command cannot be started, Timeout if no agent answers in time, or the manager's
        error.
        """
        self._closing = contextlib.ExitStack()
        with contextlib.ExitStack() as undo:
            self._client = undo.enter_context(Client(machine, timeout=timeout + REPLY_GRACE))
            self._disconnect = undo.enter_context(watching(machine, self._client.connection))
            parameters = {
                "arguments": [base64.b64encode(each).decode() for each in arguments],
                "stdin": stdin,
                "base64": True,
                "timeoutUSec": int(timeout * 1_000_000),
            }
            self._client.subscribe(f"{MACHINE}.Execute", parameters)
            started = self._client.first_reply()
            if started["state"] != "started":
                message = f"cannot run the command: {started['message']}"
                raise CommandFailed(message, status=int(started["status"]))
            streams = take_streams(self._client, started)
            for each in streams.values():
                undo.enter_context(each)
            self.stdin = streams.get("stdin")
            self.stdout, self.stderr = streams["stdout"], streams["stderr"]
            self._closing = undo.pop_all()

    def wait(self) -> Ended:
        """Wait for the command's end. Raises NotConnected."""
        try:
            end = self._client.next_reply(FOREVER)
        except NotConnected:
            self._disconnect.check()
            raise
        if end is None:
            raise Timeout("the command did not end")
        return Ended(exit_status(end), int(end["stdoutBytes"] or 0), int(end["stderrBytes"] or 0))

    def close(self) -> None:
        """End the command, and close its streams. May be called again."""
        hang_up(self)
        self._closing.close()
