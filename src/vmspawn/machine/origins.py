# SPDX-License-Identifier: LGPL-2.1-or-later
"""Defines the differences between a launched and an adopted machine."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from ..boot.boot_disk import BootDisk
from ..boot.started import Launched, SharedConsole, Started
from ..boot.state import SavedLoading, SavedSessions, State
from ..console.unread import take
from ..images import snapshot_files
from ..qmp.limits import GREETING_TIMEOUT
from ..qmp.monitor import Monitor
from ..storage.attach import Storage
from ..timeouts import ADOPT_GREETING_TIMEOUT
from .loading import end_loading, end_saving, load
from .sessions import Sessions


class Origin(Protocol):
    """The origin of a machine."""

    @property
    def lives_on(self) -> bool:
        """True if QEMU continues when this manager fails to take over the machine."""

    @property
    def greeting_timeout(self) -> float:
        """Seconds for QEMU's greeting."""

    @property
    def sessions(self) -> SavedSessions:
        """The remains of QMP sessions in QEMU."""

    @property
    def boot_disks(self) -> Sequence[BootDisk]:
        """The disks that QEMU was just started with."""

    @property
    def attachments(self) -> Mapping[str, Mapping[str, Any]]:
        """The sections of another manager's journal, by the kind of attachment."""

    @property
    def loading(self) -> SavedLoading | None:
        """The state that QEMU has to load before the guest runs, if the machine is a copy."""

    def unread(self, console: SharedConsole, *, kept_in_pipe: bool) -> bytes:
        """Read the guest's output from the time without a manager."""

    async def settle(self, monitor: Monitor, storage: Storage, sessions: Sessions) -> list[str]:
        """Reconcile QEMU with the journal; returns a line for each difference. Raises what `execute` raises."""


def origin_of(started: Started) -> Origin:
    """Return the origin of a QEMU."""
    if isinstance(started.origin, Launched):
        return _Fresh(started.origin)
    return _TakenOver(started.origin.state)


class _Fresh:
    """A QEMU that this process launched. QEMU has to release the inherited descriptors of its boot disks."""

    lives_on = False
    greeting_timeout = GREETING_TIMEOUT
    sessions = SavedSessions()

    def __init__(self, origin: Launched) -> None:
        self.boot_disks = origin.disks
        self.attachments = _without_disks(origin.attachments)
        self._incoming = incoming = origin.incoming
        self.loading = incoming.record if incoming is not None else None

    def unread(self, console: SharedConsole, *, kept_in_pipe: bool) -> bytes:
        return self._incoming.shown if self._incoming is not None else b""

    async def settle(self, monitor: Monitor, storage: Storage, sessions: Sessions) -> list[str]:
        if self._incoming is not None:
            await storage.empty_drives()
            await load(monitor, self._incoming)
        await storage.release_boot_descriptors()
        found = await monitor.execute("query-fdsets")
        sessions.keep_fdsets(each["fdset-id"] for each in found if each["fds"])
        return []


def _without_disks(attachments: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Mapping[str, Any]]:
    """Return the sections without the disks, because a copy gets its disks at its start."""
    found = dict(attachments)
    if storage := found.get("storage"):
        found["storage"] = {**storage, "attachments": []}
    return found


class _TakenOver:
    """A QEMU that another manager launched, with the disks of its state that QEMU still has."""

    lives_on = True
    greeting_timeout = ADOPT_GREETING_TIMEOUT

    boot_disks: Sequence[BootDisk] = ()

    def __init__(self, state: State) -> None:
        self.sessions = state.sessions
        self.attachments = state.attachments
        self._saving = state.saving
        self.loading = state.loading
        self._name = state.config.name or ""

    def unread(self, console: SharedConsole, *, kept_in_pipe: bool) -> bytes:
        return take(console.shown.fd, console.log, kept_in_pipe=kept_in_pipe)

    async def settle(self, monitor: Monitor, storage: Storage, sessions: Sessions) -> list[str]:
        await sessions.close_what_was_left()
        if self.loading is not None:
            await storage.empty_drives()
            await end_loading(monitor, self.loading)
        notes = [await end_saving(monitor, self._saving)] if self._saving is not None else []
        notes += await storage.reconcile(sessions.foreign_fdsets)
        if self._saving is not None:
            used = {each.path for disk in storage for each in disk.images}
            await asyncio.to_thread(_tidy_up, self._name, used, self._saving.folder)
        return notes


def _tidy_up(machine: str, used: set[str], unfinished: str) -> None:
    """Remove the remains of a save from the machine's directories. Blocks while a large state is removed."""
    snapshot_files.settle_current(machine, used)
    snapshot_files.discard(unfinished)
