# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tracks the descriptors that sessions have passed to QEMU, to close them when the session ends.

- QEMU keeps the names of `getfd` per monitor, and all sessions share one monitor. So a name that one session holds is
  refused to the others. Names in the arguments of other commands (`netdev_add` with `fd=`) are not tracked. QEMU
  drops a name when a command uses the descriptor, but here a session keeps the name until it closes the name or ends.
- QEMU shares the sets of `add-fd` among all monitors. When a session ends, its unused descriptors are removed from the
  sets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import msgspec

from ..syntax.envelope import Command
from ..syntax.replies import Reply

#: Commands that use a descriptor passed with them.
CONSUMING = frozenset((b"getfd", b"add-fd"))

#: Commands that change the names or sets.
WATCHED = CONSUMING | {b"closefd", b"remove-fd"}

#: The name for the `getfd` that vmspawn sends after a failed command. This `getfd` succeeds only if QEMU still has the
#: descriptor that came with the failed command. The name is then closed at once.
SPARE = "vmspawn.unclaimed"

CLAIM_SPARE = b'{"execute":"getfd","arguments":{"fdname":"%b"}' % SPARE.encode()
CLOSE_SPARE = b'{"execute":"closefd","arguments":{"fdname":"%b"}' % SPARE.encode()

#: Lists the sets from which block nodes have open files.
QUERY_USERS = b'{"execute":"query-named-block-nodes","arguments":{"flat":true}'


class _Arguments(msgspec.Struct):
    """The arguments of the watched commands."""

    fdname: str | None = None
    fdset_id: int | None = msgspec.field(name="fdset-id", default=None)
    fd: int | None = None


class _Added(msgspec.Struct):
    fdset_id: int = msgspec.field(name="fdset-id")
    fd: int


class _AddedReply(msgspec.Struct):
    added: _Added = msgspec.field(name="return")


class Descriptors:
    """The descriptors of all sessions. A holder is a session, or any other object."""

    __slots__ = ("_claims", "_members", "_names", "_on_change")

    def __init__(self, *, on_change: Callable[[], None]) -> None:
        """Begin without names.

        `on_change` is called when the names have changed, before the command with a new name is sent.
        """
        self._names: dict[str, object] = {}
        # Names whose getfd has no reply yet.
        self._claims: set[str] = set()
        # The holders of descriptors in sets, by QEMU's numbers of the set and the descriptor.
        self._members: dict[tuple[int, int], object] = {}
        self._on_change = on_change

    @property
    def all_names(self) -> tuple[str, ...]:
        """The names that any session holds."""
        return tuple(self._names)

    def claim(self, holder: object, command: Command) -> str | None:
        """Claim the name in a session's watched command; returns an error message if another session holds it."""
        name = _arguments(command).fdname
        if name is None:
            return None
        if self._names.get(name, holder) is not holder:
            if command.name == b"closefd":
                return f"File descriptor named '{name}' not found"
            return f"File descriptor name '{name}' is held by another session"
        if command.name == b"getfd" and name not in self._names:
            self._names[name] = holder
            self._claims.add(name)
            self._on_change()
        return None

    def settle(self, holder: object, command: Command, reply: Reply) -> None:
        """Update the names and sets after the reply to a watched command."""
        arguments = _arguments(command)
        match command.name:
            case b"getfd" if arguments.fdname in self._claims:
                self._claims.discard(arguments.fdname)
                if reply.is_error:
                    self.release(arguments.fdname)
            case b"closefd" if arguments.fdname is not None and not reply.is_error:
                self.release(arguments.fdname)
            case b"add-fd" if not reply.is_error:
                added = msgspec.json.decode(reply.line, type=_AddedReply).added
                self._members[added.fdset_id, added.fd] = holder
            case b"remove-fd" if not reply.is_error:
                for member in [member for member in self._members if member[0] == arguments.fdset_id]:
                    if arguments.fd in (None, member[1]):
                        del self._members[member]

    def holds_names(self, holder: object) -> bool:
        """Return whether the session holds names, which exist on the sessions' monitor only."""
        return bool(self._names) and holder in self._names.values()

    def names(self, holder: object) -> list[str]:
        """Return the names that a session holds."""
        return [name for name, other in self._names.items() if other is holder]

    def release(self, name: str) -> None:
        """Forget a name that is free in QEMU."""
        self._claims.discard(name)
        if self._names.pop(name, None) is not None:
            self._on_change()

    def take_members(self, holder: object) -> list[tuple[int, int]]:
        """Forget and return the descriptors that a session added to sets, as pairs of set and descriptor number."""
        members = [member for member, other in self._members.items() if other is holder]
        for member in members:
            del self._members[member]
        return members


def closefd(name: str) -> bytes:
    """Return the body of the command that closes a name."""
    return b'{"execute":"closefd","arguments":{"fdname":%b}' % msgspec.json.encode(name)


def remove_unused(members: list[tuple[int, int]], nodes: bytes) -> Iterator[bytes]:
    """Yield the bodies of the commands that remove a session's descriptors, except from sets that a block node uses.

    QEMU cannot reopen a node without its set. `nodes` is the reply to QUERY_USERS.
    """
    for fdset, fd in members:
        if b'/dev/fdset/%d"' % fdset not in nodes:
            yield b'{"execute":"remove-fd","arguments":{"fdset-id":%d,"fd":%d}' % (fdset, fd)


def _arguments(command: Command) -> _Arguments:
    """Return a watched command's arguments, empty if QEMU will refuse them."""
    try:
        return msgspec.json.decode(command.arguments or b"{}", type=_Arguments)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return _Arguments()
