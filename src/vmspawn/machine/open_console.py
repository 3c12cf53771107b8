# SPDX-License-Identifier: LGPL-2.1-or-later
"""The console of a QEMU that was just launched or adopted, with what was printed while nobody was there."""

from __future__ import annotations

from collections.abc import Callable

from ..boot.launch import Launched
from ..console import viewers
from ..console.hub import Console
from ..console.unread import take
from ..host import runtime


def open_console(launched: Launched, log_failed: Callable[[OSError], None]) -> Console | None:
    """The console, if it is ours to share; takes what `launched` has of it. `log_failed` is told of a `--log=` that
    takes no more."""
    if not launched.console:
        return None
    (typed, shown), launched.console = launched.console, ()
    kept, launched.kept = launched.kept, None
    in_pipe = launched.config.console_transport == "virtio"
    unread = take(shown, kept, kept_in_pipe=in_pipe) if launched.saved else b""
    console = Console(typed, shown, launched.sockets.pop(runtime.CONSOLE), kept, unread)
    if launched.console_log >= 0:
        console.attach(viewers.Transcript(console, launched.console_log, log_failed))
        launched.console_log = -1
    return console
