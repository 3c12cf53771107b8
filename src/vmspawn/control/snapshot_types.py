# SPDX-License-Identifier: LGPL-2.1-or-later
"""Defines the types of snapshots and copies in `io.vmspawn.Machine`. Names are in Varlink's case."""

import typing

from .types import varlink_type

# asyncvarlink evaluates annotations, so this module cannot use `from __future__ import annotations`.


@varlink_type
class FrozenDisk:
    """A disk of a snapshot: the image, which no longer changes, and the overlay that the guest now writes to."""

    name: str
    base: str
    overlay: str


class Progress(typing.TypedDict):
    """The progress of a save, in bytes of RAM; the last reply has the snapshot and the length of the pause."""

    doneBytes: int
    totalBytes: int
    snapshot: typing.NotRequired[str | None]
    sizeBytes: typing.NotRequired[int | None]
    pauseUSec: typing.NotRequired[int | None]
    disks: typing.NotRequired[list[FrozenDisk] | None]


@varlink_type
class ListedSnapshot:
    """A snapshot. `sizeBytes` is the size of its own files; `forks` are the machines that were started from it."""

    name: str
    createdUSec: int
    parent: str | None
    sizeBytes: int
    disks: list[str]
    forks: list[str]


@varlink_type
class WantedForward:
    """A port of the host to forward to a copy, as in AddForward."""

    guestPort: int
    port: int | None = None
    address: str | None = None
    protocol: str | None = None
