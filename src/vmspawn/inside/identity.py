# SPDX-License-Identifier: LGPL-2.1-or-later
"""Gives the guest of a copy a new host name, machine ID and MAC addresses, and runs its hooks."""

from __future__ import annotations

import asyncio
import os
import re

from ..agent.protocol import Exited, Failed
from ..errors import StartError
from .commands import Commands, Wanted

#: Arguments: the host name, the machine ID, the fourth and fifth byte of the MAC addresses. A file that the guest does
#: not have is not created, because the guest does not use it.
_SCRIPT = r"""
name=$1 id=$2 mac=$3 number=0
echo "$name" >/proc/sys/kernel/hostname || exit 125
[ ! -e /etc/hostname ] || echo "$name" >/etc/hostname || exit 125
[ ! -e /etc/machine-id ] || echo "$id" >/etc/machine-id || exit 125
for device in /sys/class/net/*/device; do
    [ -e "$device" ] || continue
    card=${device%/device} card=${card##*/} number=$((number + 1))
    ip link set dev "$card" address "52:54:00:$mac:$(printf %02x $number)" || exit 125
done
for hook in /etc/vmspawn/fork.d/*; do
    # No client reads the hook's output.
    [ ! -x "$hook" ] || "$hook" "$name" >/dev/null 2>&1 || exit 124
done
"""

#: Seconds that the guest and its hooks may take.
_TIMEOUT = 60.0

#: The reasons that the script reports by its exit status.
_REASONS = {124: "a hook in /etc/vmspawn/fork.d failed", 125: "the guest refused a setting"}


async def renew(commands: Commands, machine: str) -> None:
    """Give the guest a new identity, with the machine's name as its host name. Raises StartError."""
    mac = os.urandom(2)
    words = ["sh", "-c", _SCRIPT, "sh", host_name(machine), os.urandom(16).hex(), f"{mac[0]:02x}:{mac[1]:02x}"]
    command = await commands.start(Wanted(tuple(os.fsencode(word) for word in words), stdin=False))
    try:
        async with asyncio.timeout(_TIMEOUT):
            end = await command.ended()
    except TimeoutError:
        raise _failed(machine, f"the hooks in /etc/vmspawn/fork.d have not ended within {_TIMEOUT:g} s") from None
    finally:
        command.close()
    if isinstance(end, Exited) and end.status == 0:
        return
    if isinstance(end, Exited) and end.status in _REASONS:
        why = _REASONS[end.status]
    elif isinstance(end, Failed):
        why = os.strerror(end.errno)
    else:
        why = "the script was killed"
    raise _failed(machine, why)


def _failed(machine: str, why: str) -> StartError:
    return StartError(f"cannot give the copy {machine} an identity of its own: {why}")


def host_name(machine: str) -> str:
    """Return the machine's name as a host name: letters, digits and dashes, up to 64."""
    return re.sub(r"[^A-Za-z0-9-]+", "-", machine).strip("-")[:64] or "copy"
