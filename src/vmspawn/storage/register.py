# SPDX-License-Identifier: LGPL-2.1-or-later
"""The register of a machine's disks, and its text in the journal."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from ..errors import NoSuchStorage
from .attached_disk import AttachedDisk

#: Disks that are named to somebody who asked for one that is not there.
_NAMED = 8


class Register:
    """The disks by their names."""

    def __init__(self) -> None:
        self._attachments: dict[str, AttachedDisk] = {}
        # What the journal says of each disk, in JSON: there may be many, and mostly one has changed.
        self._records: dict[AttachedDisk, str] = {}

    def __iter__(self) -> Iterator[AttachedDisk]:
        return iter(tuple(self._attachments.values()))

    def find(self, name: str) -> AttachedDisk:
        """The disk of that name. Raises NoSuchStorage."""
        try:
            return self._attachments[name]
        except KeyError:
            raise NoSuchStorage(f"there is no disk named {name}", hint=self._names_hint()) from None

    def _names_hint(self) -> str:
        """What there is instead, as far as a line has room for it."""
        names = list(self._attachments)
        if not names:
            return "the machine has no disks"
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        return f"its disks: {', '.join(names[:_NAMED])}{more}"

    def add(self, attachment: AttachedDisk) -> None:
        """Enter a disk."""
        self._attachments[attachment.name] = attachment

    def remove(self, attachment: AttachedDisk) -> None:
        """Strike a disk out."""
        del self._attachments[attachment.name]

    # The journal.

    def changed(self, attachment: AttachedDisk | None) -> None:
        """What the journal says of a disk is not true any more; None is any of them."""
        if attachment is None:
            self._records.clear()
        elif self._attachments.get(attachment.name) is attachment:
            self._records[attachment] = to_json(attachment.to_state())
        else:
            self._records.pop(attachment, None)

    def text(self) -> str:
        """All disks, as a list in JSON."""
        for attachment in self._attachments.values():
            if attachment not in self._records:
                self._records[attachment] = to_json(attachment.to_state())
        return f"[{', '.join(self._records.values())}]"


def to_json(value: object) -> str:
    """A value in JSON."""
    return msgspec.json.encode(value).decode()
