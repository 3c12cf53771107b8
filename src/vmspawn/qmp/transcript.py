# SPDX-License-Identifier: LGPL-2.1-or-later
"""Writes a transcript of the messages on QEMU's monitors.

A line has the time, the monitor, `->` or `<-`, and the message without secrets. Three parts are left out:

1. Values of members that QEMU's schema uses for secrets (qapi/crypto.json, qapi/ui.json, qapi/block-core.json).
2. Arguments of `human-monitor-command`, except those of `info`, which only reads.
3. A result that is a string, because `qom-get` reads the secret of an object. Results of `human-monitor-command`, which
   are lines, are kept.
"""

from __future__ import annotations

import os
import re
import time

from ..errors import UsageError

#: The size in bytes at which the file is renamed to FILE.old, and a new file begun.
SIZE_MAX = 32 << 20

_SECRETS = rb'"(password|passwd|data|secret|user-password|key)"(\s*:\s*)"(?:[^"\\]|\\.)*"'
_SECRET = re.compile(_SECRETS)
_HIDDEN = rb'"\1"\2"(left out)"'

_HUMAN = re.compile(rb'"command-line"(\s*:\s*)"(?!info )(\w+) (?:[^"\\]|\\.)*"')
_HIDDEN_HUMAN = rb'"command-line"\1"\2 (left out)"'

# A result without a carriage return: each line of human-monitor-command ends with one.
_ANSWER = re.compile(rb'"return"(\s*:\s*)"(?:[^"\\]|\\[^r])+"')
_HIDDEN_ANSWER = rb'"return"\1"(left out)"'


def without_secrets(message: bytes) -> bytes:
    """Return a message with its secrets replaced by `(left out)`."""
    return _ANSWER.sub(_HIDDEN_ANSWER, _HUMAN.sub(_HIDDEN_HUMAN, _SECRET.sub(_HIDDEN, message)))


class Transcript:
    """A transcript in a file, which `close` closes. A failed write ends the transcript."""

    def __init__(self, path: str) -> None:
        """Open the file for appending, with mode 0600. Raises UsageError if that fails."""
        self._path = os.path.abspath(path)
        try:
            self._open()
        except OSError as error:
            raise UsageError.with_fields(
                "cannot write {qmp_log={path}}: {reason}", path=path, reason=error.strerror
            ) from None

    def _open(self) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        self._fd = os.open(self._path, flags, 0o600)
        self._size = os.fstat(self._fd).st_size

    def sent(self, monitor: str, message: bytes) -> None:
        """Record a message to QEMU."""
        self._write(monitor, b"->", message)

    def received(self, monitor: str, message: bytes) -> None:
        """Record a message from QEMU."""
        self._write(monitor, b"<-", message)

    def _write(self, monitor: str, direction: bytes, message: bytes) -> None:
        if self._fd < 0:
            return
        now = time.time()
        stamp = f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.localtime(now))}.{int(now * 1000) % 1000:03} {monitor} "
        line = stamp.encode() + direction + b" " + without_secrets(message.strip()) + b"\n"
        try:
            self._size += os.write(self._fd, line)
            if self._size > SIZE_MAX:
                os.rename(self._path, self._path + ".old")
                self.close()
                self._open()
        except OSError:
            self.close()

    def close(self) -> None:
        """Close the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
