# SPDX-License-Identifier: LGPL-2.1-or-later
"""Keeps the attachments of one kind, and encodes their section of the journal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, TypeVar

import msgspec

from .attachment import Attachment
from .journal import Journal

_A = TypeVar("_A", bound=Attachment)


class Register(Generic[_A]):
    """The attachments of one kind, by name."""

    def __init__(
        self,
        journal: Journal,
        kind: str,
        load: Callable[[dict[str, Any]], _A],
        saved: Mapping[str, Any],
        more: Callable[[], Mapping[str, object]] = dict,
    ) -> None:
        """Load the attachments from `saved`, which is the section that another manager wrote, or empty.

        `load` makes an attachment from its record. `more` returns further members of the section. Raises KeyError,
        TypeError or ValueError if the section is invalid.
        """
        self._journal = journal
        self._more = more
        self._next_number = int(saved.get("next", 0))
        # The JSON of each attachment is cached, because most writes follow a change of only one.
        self._records: dict[_A, str] = {}
        self._attachments: dict[str, _A] = {}
        for record in saved.get("attachments", ()):
            self.add(_restored(load(record)))
        journal.add_section(kind, self.text)

    def __iter__(self) -> Iterator[_A]:
        return iter(tuple(self._attachments.values()))

    def get(self, name: str) -> _A | None:
        """Return the attachment of that name, or None."""
        return self._attachments.get(name)

    def add(self, attachment: _A) -> None:
        """Add an attachment."""
        self._attachments[attachment.name] = attachment

    def remove(self, attachment: _A) -> None:
        """Remove an attachment."""
        del self._attachments[attachment.name]

    # Numbers for names in QEMU.

    def fresh_number(self) -> int:
        """Return a number that no name of this kind has had."""
        self._next_number += 1
        return self._next_number - 1

    def numbers_used_up_to(self, number: int) -> None:
        """Mark numbers up to `number` as used."""
        self._next_number = max(self._next_number, number + 1)

    # The journal.

    def changed(self, attachment: _A | None = None) -> None:
        """Update an attachment's record, or with None all records, without writing the journal."""
        if attachment is None:
            self._records.clear()
        elif self._attachments.get(attachment.name) is attachment:
            self._records[attachment] = to_json(attachment.to_state())
        else:
            self._records.pop(attachment, None)

    def save(self, attachment: _A | None = None) -> None:
        """Write the journal after a change of one attachment, or, with None, of all. Raises SystemFailure."""
        self.changed(attachment)
        self._journal.write()

    def text(self) -> str:
        """Return the section in JSON."""
        for attachment in self._attachments.values():
            if attachment not in self._records:
                self._records[attachment] = to_json(attachment.to_state())
        head = to_json({"next": self._next_number, **self._more()})[:-1]
        return f'{head},"attachments":[{",".join(self._records.values())}]}}'


def _restored(attachment: _A) -> _A:
    """Call `restore` of the completed steps of a loaded attachment; returns the attachment."""
    done = attachment.done
    steps = [step for step in attachment.steps() if step.name in done]
    attachment.done = [step.name for step in steps]
    for step in steps:
        step.restore()
    attachment.settled.set()
    return attachment


def to_json(value: object) -> str:
    """Return a value in JSON."""
    return msgspec.json.encode(value).decode()
