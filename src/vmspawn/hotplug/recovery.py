# SPDX-License-Identifier: LGPL-2.1-or-later
"""Adopts the attachments of a manager that died: compares its journal with QEMU, and settles each attachment.

- A detach that was under way continues.
- An attach that was under way is kept if QEMU has plugged in the device and this proves that the attachment is
  complete (`Attachment.is_whole`), and undone otherwise. Its caller never got a reply, so either outcome is correct.
- An attachment whose device was removed meanwhile is undone.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import TypeVar

from .attachment import Attachment, State
from .hotplug import Hotplug

_A = TypeVar("_A", bound=Attachment)


async def _nothing_more(attachment: Attachment) -> None:
    """Do nothing, for a kind that has nothing more to settle."""


async def settle(
    hotplug: Hotplug,
    attachments: Iterable[_A],
    devices: frozenset[str],
    note: Callable[[str], None],
    *,
    settle_attached: Callable[[_A], Awaitable[None]] = _nothing_more,
    settle_detaching: Callable[[_A], Awaitable[None]] = _nothing_more,
) -> None:
    """Settle attachments that were loaded from a journal.

    `devices` are the ids of QEMU's devices. `note` is called with messages for users. `settle_attached` settles an
    interrupted change of an attached device, `settle_detaching` does the kind's work before the device is unplugged.
    Raises Timeout or NotConnected.
    """
    for attachment in attachments:
        if attachment.device not in devices:
            attachment.gone.set()
        elif attachment.state is State.ATTACHING and attachment.is_whole:
            # The device is the last step, and the journal is not written after it.
            attachment.state = State.ATTACHED
        if attachment.state is State.ATTACHED and not attachment.gone.is_set():
            await settle_attached(attachment)
            continue
        if attachment.events is not None:
            note(_note(attachment))
        if attachment.state is State.DETACHING:
            await settle_detaching(attachment)
        attachment.has_failed = attachment.state is State.ATTACHING
        hotplug.unwind(attachment)


def _note(attachment: Attachment) -> str:
    """Return the message about an attachment that is removed."""
    name = attachment.name
    if attachment.state is State.DETACHING:
        return f"the detach of {name} continues"
    if attachment.state is State.ATTACHED:
        return f"{name} was removed meanwhile"
    if attachment.gone.is_set():
        return f"{name} has no device in QEMU; its remains are removed"
    return f"the attach of {name} was interrupted; it is undone"
