# SPDX-License-Identifier: LGPL-2.1-or-later
"""Serves the QMP sessions of a machine. The first session starts the multiplexer, because many machines have none."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable
from typing import TYPE_CHECKING

from ..boot.sandbox import may_start_programs
from ..boot.started import Monitors, connect
from ..boot.state import SavedSessions
from ..errors import NotConnected, Timeout
from ..host import runtime
from ..hotplug.journal import Journal
from ..qmp.saving import Saving

if TYPE_CHECKING:
    from ..qmp.share.multiplexer import Multiplexer
    from ..qmp.share.session import Session
    from ..qmp.transcript import Transcript


class Sessions:
    """Shares two of QEMU's monitors among clients. The multiplexer owns the monitors' sockets once it was started.

    `before`, a section of the journal, names objects that another manager's sessions may have left in QEMU. `pid` is
    QEMU's process id.
    """

    def __init__(
        self,
        monitors: Monitors,
        before: SavedSessions,
        journal: Journal,
        transcript: Transcript | None = None,
        *,
        directory: runtime.MachineDirectory,
        pid: int,
        saving: Saving,
    ) -> None:
        self._directory = directory
        self._pid = pid
        self._saving = saving
        self._transcript = transcript
        self._monitors = monitors
        self._journal = journal
        self._before = before
        self._multiplexer: Multiplexer | None = None
        self._starting: asyncio.Task[Multiplexer] | None = None
        # True if a failed start of the multiplexer has closed the connections to QEMU.
        self._is_disconnected = False
        self._released = asyncio.Event()
        self._released.set()
        #: Descriptor sets that exist from boot, and belong neither to vmspawn nor to a session.
        self.foreign_fdsets: tuple[int, ...] = self._before.foreign_fdsets
        journal.add_section("sessions", lambda: self.saved.to_json())

    @property
    def open(self) -> tuple[Session, ...]:
        """The clients that are connected."""
        return self._multiplexer.sessions if self._multiplexer else ()

    @property
    def saved(self) -> SavedSessions:
        """The objects of sessions that another manager would have to remove."""
        names = self._multiplexer.names if self._multiplexer else ()
        return SavedSessions(
            self._starting is not None or self._before.has_served,
            tuple({*names, *self._before.names}),
            self.foreign_fdsets,
        )

    async def multiplexer(self) -> Multiplexer:
        """Return the multiplexer, which shares QEMU among the sessions. The first call starts it.

        Raises Timeout if QEMU sends no greeting, NotConnected if QEMU has ended.
        """
        await self._released.wait()
        self._forget_failed_start()
        if self._starting is None:
            self._starting = asyncio.create_task(self._start())
            self._journal.write()
        # A caller that is cancelled does not cancel the start for the others.
        return await asyncio.shield(self._starting)

    @contextlib.asynccontextmanager
    async def held(self) -> AsyncIterator[None]:
        """Hold back the commands of all sessions until the end of the block. Raises Timeout, NotConnected."""
        self._released.clear()
        self._forget_failed_start()
        try:
            if self._starting is None:
                yield
            else:
                async with (await asyncio.shield(self._starting)).held():
                    yield
        finally:
            self._released.set()

    def _forget_failed_start(self) -> None:
        """Let the next client connect to QEMU anew, if QEMU did not answer in time."""
        task = self._starting
        if task is not None and task.done() and not task.cancelled() and isinstance(task.exception(), Timeout):
            self._starting = None
            self._is_disconnected = True

    def _reconnect(self) -> None:
        """Connect to the sessions' monitors again. Raises NotConnected, or Timeout if their queues are full."""
        _, *names = runtime.MONITORS
        try:
            with contextlib.ExitStack() as undo:
                sessions, bulk = (connect(self._directory, name, undo) for name in names)
                undo.pop_all()
        except BlockingIOError:
            raise Timeout("QEMU has not accepted earlier connections to its monitors", hint="try again") from None
        except OSError as error:
            raise NotConnected(f"cannot connect to QEMU's monitors: {error.strerror}") from None
        self._monitors = self._monitors._replace(sessions=sessions, bulk=bulk)
        self._is_disconnected = False

    async def _start(self) -> Multiplexer:
        from ..qmp.share.multiplexer import Multiplexer

        if self._is_disconnected:
            self._reconnect()
        # The manager's own monitor reports QEMU's exit.
        self._multiplexer = await Multiplexer.connect(
            self._monitors.sessions,
            self._monitors.bulk,
            on_lost=lambda _: None,
            on_names=self._journal.write,
            transcript=self._transcript,
            may_spawn=may_start_programs(self._pid),
            saving=self._saving,
        )
        return self._multiplexer

    def keep_fdsets(self, numbers: Iterable[int]) -> None:
        """Keep descriptor sets that exist from boot, and belong neither to vmspawn nor to a session.

        The caller writes the journal.
        """
        self.foreign_fdsets = tuple(numbers)

    async def close_what_was_left(self) -> None:
        """Close the descriptors that sessions of another manager left in QEMU."""
        if not self._before.has_served:
            return
        multiplexer = await self.multiplexer()
        await multiplexer.close_names(self._before.names)
        self._before = SavedSessions(has_served=True)
        self._journal.write()

    async def close(self) -> None:
        """End the sessions."""
        if self._starting is not None:
            self._starting.cancel()
            # The callers that waited for the start have its result or error.
            await asyncio.gather(self._starting, return_exceptions=True)
        if self._multiplexer is not None:
            await self._multiplexer.close()
