# SPDX-License-Identifier: LGPL-2.1-or-later
"""Shares the console of a running QEMU."""

from __future__ import annotations

from collections.abc import Callable

from ..boot.started import Started
from ..console import viewers
from ..console.hub import Console
from .origins import Origin


def open_console(started: Started, origin: Origin, on_log_failed: Callable[[OSError], None]) -> Console | None:
    """Return the console, or None if the console is QEMU's own. Takes over the console's descriptors.

    `on_log_failed` is called if a write to the file of `--log=` fails.
    """
    shared = started.console
    if shared is None:
        return None
    unread = origin.unread(shared, kept_in_pipe=started.config.console_transport == "virtio")
    console = Console(shared.typed.take(), shared.shown.take(), shared.listener, shared.log, unread)
    if started.transcript is not None:
        console.attach(viewers.Transcript(console, started.transcript.take(), on_log_failed))
    return console
