# SPDX-License-Identifier: LGPL-2.1-or-later
"""Reads the replies of the method Execute, for the verbs that run commands in the guest."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Mapping
from typing import Any

from ...control.client import Client

_STREAMS = ("stdin", "stdout", "stderr", "terminal")


def take_streams(client: Client, started: Mapping[str, Any]) -> dict[str, socket.socket]:
    """Return the command's streams by name, from the first reply. The caller owns them."""
    names = [each for each in _STREAMS if started.get(each) is not None]
    with contextlib.ExitStack() as undo:
        streams = {
            name: undo.enter_context(socket.socket(fileno=client.take_descriptor(started[name]))) for name in names
        }
        undo.pop_all()
    return streams


def exit_status(end: Mapping[str, Any]) -> int:
    """Return a shell's exit status for the last reply: 128 + N if signal N ended the command."""
    return 128 + int(end["signal"]) if end["state"] == "killed" else int(end["status"])
