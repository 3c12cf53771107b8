# SPDX-License-Identifier: LGPL-2.1-or-later
"""Take over the attachments of a manager that died: compare its journal with QEMU, and settle each of them.

A detach that was under way goes on; an attach stays if QEMU had plugged the device in, and is taken back if not.
Whoever asked for it was never answered, so either is the truth. What lost its device meanwhile is taken apart.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import TypeVar

from .attachment import Attachment, State
from .hotplug import Hotplug

_A = TypeVar("_A", bound=Attachment)


async def _nothing_more(attachment: Attachment) -> None:
    """The kind has no knowledge of its own to add."""


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

    `devices` are the ids of the devices that QEMU has. `note` is told, in words, what users should know. The kind goes
    on with a change of what is attached by `settle_attached`, and with what precedes an unplug by `settle_detaching`.
    Raises Timeout or NotConnected.
    """
    for attachment in attachments:
        if attachment.device not in devices:
            attachment.gone.set()
        elif attachment.state is State.ATTACHING and attachment.is_whole:
            # The device comes last, and the journal is not written again after it.
            attachment.state = State.ATTACHED
        if attachment.state is State.ATTACHED and not attachment.gone.is_set():
            await settle_attached(attachment)
            continue
        if attachment.events is not None:
            note(_FOUND[attachment.state].format(name=attachment.name))
        if attachment.state is State.DETACHING:
            await settle_detaching(attachment)
        hotplug.unwind(attachment)


#: What is said of an attachment that does not stay.
_FOUND = {
    State.ATTACHING: "{name} has no device in QEMU; what is left of it is removed",
    State.DETACHING: "goes on detaching {name}",
    State.ATTACHED: "{name} was removed meanwhile",
}
