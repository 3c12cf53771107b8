# SPDX-License-Identifier: LGPL-2.1-or-later
"""Runs a QMP shell with line editing by prompt_toolkit, completion from QEMU's schema, and live events."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shlex
import socket
import sys
import termios
import tty
from collections.abc import Iterator
from typing import Any

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.patch_stdout import patch_stdout

from ...errors import NotConnected, QmpError, UsageError
from ...qmp.monitor import Monitor
from ...text import printable
from ...user_directories import user_directory
from .qmp_session import parse_arguments


def run_shell(connected: socket.socket, received: bytes, machine: str) -> bool:
    """Run a shell on this terminal until Ctrl-D or the end of the connection. Returns whether the connection ended.

    The caller keeps the socket.
    """
    return asyncio.run(_Shell(machine).run(connected.dup(), received))


class SchemaCompleter(Completer):
    """Completes commands and the names of their arguments from query-qmp-schema."""

    def __init__(self, schema: list[dict[str, Any]]) -> None:
        by_name = {entry["name"]: entry for entry in schema}
        self.commands = {
            entry["name"]: sorted(member["name"] for member in by_name[entry["arg-type"]].get("members", ()))
            for entry in schema
            if entry["meta-type"] == "command"
        }

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterator[Completion]:
        """Yield the words that fit at the cursor."""
        before = document.text_before_cursor
        word = before.rpartition(" ")[2]
        first, blank, _ = before.partition(" ")
        if not blank:
            candidates = sorted(self.commands)
        else:
            candidates = [f"{name}=" for name in self.commands.get(first, ()) if f" {name}=" not in before]
        for candidate in candidates:
            if candidate.startswith(word):
                yield Completion(candidate, start_position=-len(word))


class _Shell:
    def __init__(self, machine: str) -> None:
        self._machine = machine

    async def run(self, connected: socket.socket, received: bytes) -> bool:
        monitor = Monitor(connected, received=received)
        try:
            greeting = await monitor.greeting()
            version = greeting["version"]["qemu"]
            print(f"QEMU {version['major']}.{version['minor']}.{version['micro']}. COMMAND KEY=VALUE…; Ctrl-D leaves.")
            events = asyncio.create_task(self._show_events(monitor))
            completer = SchemaCompleter(await monitor.execute("query-qmp-schema"))
            session: PromptSession[str] = PromptSession(history=_history(), completer=completer)
            with patch_stdout(), _unbuffered_keys():
                hung_up = await self._converse(monitor, session)
            events.cancel()
            return hung_up
        finally:
            monitor.close()

    async def _converse(self, monitor: Monitor, session: PromptSession[str]) -> bool:
        while not monitor.closed.is_set():
            try:
                line = await session.prompt_async(f"{self._machine}> ")
            except KeyboardInterrupt:
                continue
            except EOFError:
                return False
            if line.strip():
                await self._execute(monitor, line)
        return True

    async def _execute(self, monitor: Monitor, line: str) -> None:
        try:
            command, arguments = _parse(line)
            result = await monitor.execute(command, arguments)
        except UsageError as error:
            print(printable(str(error)))
        except QmpError as error:
            print(printable(f"{error.error_class}: {error.description}"))
        except NotConnected:
            return
        else:
            print(json.dumps(result, indent=2))

    async def _show_events(self, monitor: Monitor) -> None:
        with monitor.events() as events:
            async for event in events:
                print(printable(f"{event.name} {json.dumps(event.data) if event.data else ''}".rstrip()))


@contextlib.contextmanager
def _unbuffered_keys() -> Iterator[None]:
    """Keep keys that are typed between two prompts. A terminal in canonical mode would swallow Ctrl-D."""
    before = termios.tcgetattr(sys.stdin)
    tty.setcbreak(sys.stdin, termios.TCSADRAIN)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def _parse(line: str) -> tuple[str, dict[str, Any]]:
    """Parse a command and its arguments. Raises UsageError."""
    if line.lstrip().startswith("{"):
        try:
            message = json.loads(line)
            return str(message["execute"]), dict(message.get("arguments", {}))
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f"not a QMP command: {error}") from None
    command, _, rest = line.strip().partition(" ")
    if rest.lstrip().startswith("{"):
        return command, parse_arguments([rest.strip()])
    try:
        return command, parse_arguments(shlex.split(rest))
    except ValueError as error:
        raise UsageError(str(error)) from None


def _history() -> History:
    """Return the user's history, in a file if the user has a directory for it."""
    base = user_directory("XDG_STATE_HOME", ".local/state")
    if base is None:
        return InMemoryHistory()
    folder = os.path.join(base, "vmspawn")
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError:
        return InMemoryHistory()
    return FileHistory(os.path.join(folder, "qmp-history"))
