# SPDX-License-Identifier: LGPL-2.1-or-later
"""Adds, removes and lists the forwards of a running machine.

QEMU has no QMP commands for forwards, only commands of its human monitor, whose answers are text (docs/qemu.md,
"User-mode network"). QEMU keeps the forwards, so another manager finds them there.
"""

from __future__ import annotations

import asyncio
import errno
import re

from ..errors import NoSuchForward, NotSupported, PortInUse, SystemFailure, VmspawnError
from ..host import ports
from ..qmp.monitor import Monitor
from .forward import ANY_ADDRESS, NETDEV, Forward

#: A forward in `info usernet`: protocol, descriptor, address and port of the host, address and port of the guest.
_ROW = re.compile(r"^  (TCP|UDP)\[HOST_FORWARD\]\s+\d+\s+(\S+)\s+(\d+)\s+\S+\s+(\d+)\s", re.MULTILINE)


class Forwards:
    """The forwards of one machine."""

    def __init__(self, monitor: Monitor, machine: str) -> None:
        self._monitor = monitor
        self._machine = machine
        # `add` compares the list before with the list after, so changes must not overlap.
        self._lock = asyncio.Lock()

    async def list(self) -> list[Forward]:
        """List the forwards, sorted by protocol, address and port. Raises Timeout, NotConnected."""
        rows = _ROW.findall(_section(await self._ask("info usernet")))
        found = [
            Forward(int(guest_port), int(port), ANY_ADDRESS if address == "*" else address, protocol.lower())
            for protocol, address, port, guest_port in rows
        ]
        return sorted(found, key=lambda each: (each.protocol, each.address, each.port))

    async def add(self, wanted: Forward) -> Forward:
        """Forward a port, and return the forward with the port that was chosen.

        Raises PortInUse, SystemFailure if the host refuses the port for another reason, NotSupported without a
        user-mode network, Timeout or NotConnected.
        """
        async with self._lock:
            before = await self.list()
            answer = await self._ask(
                f"hostfwd_add {NETDEV} {wanted.protocol}:{wanted.address}:{wanted.port}-:{wanted.guest_port}"
            )
            if answer:
                # The search for the process that uses the port reads the descriptors of all processes.
                raise await asyncio.to_thread(self._refusal, wanted, answer)
            added = [each for each in await self.list() if each not in before and _is_like(each, wanted)]
        if not added:
            raise NotSupported(f"cannot forward {wanted}: QEMU does not list the forward that it added")
        return added[0]

    async def remove(self, wanted: Forward) -> Forward:
        """Remove a forward by its protocol, address and port, and return it. Its open connections stay.

        Raises NoSuchForward, Timeout or NotConnected.
        """
        async with self._lock:
            found = next((each for each in await self.list() if _is_named(each, wanted)), None)
            if found is None:
                raise self._missing(wanted)
            answer = await self._ask(f"hostfwd_remove {NETDEV} {found.protocol}:{found.host}")
            if not answer.endswith("removed"):
                raise self._missing(wanted)
        return found

    async def _ask(self, line: str) -> str:
        answer = await self._monitor.execute("human-monitor-command", {"command-line": line})
        return str(answer).replace("\r", "").rstrip()

    def _missing(self, wanted: Forward) -> NoSuchForward:
        return NoSuchForward(
            f"machine {self._machine} has no forward from {wanted.host}{wanted.suffix}",
            hint=f"see: vmctl list-forwards {self._machine}",
        )

    def _refusal(self, wanted: Forward, answer: str) -> VmspawnError:
        """Return the error for a forward that QEMU refused. QEMU does not report the reason."""
        if "unrecognized netdev" in answer:
            return NotSupported.with_fields(
                "machine {name} has no user-mode network",
                hint="start it with {network_user=True}",
                name=self._machine,
            )
        refused = f"cannot forward {wanted.host}{wanted.suffix} to the guest"
        trouble = ports.bind_error(wanted.protocol, wanted.address, wanted.port)
        if trouble == errno.EADDRINUSE:
            holder = ports.holder(wanted.protocol, wanted.address, wanted.port) or "another process"
            return PortInUse(f"{refused}: {holder} has the port", hint="use another port, or 0 for any free one")
        if trouble:
            return SystemFailure(refused, trouble, hint=_HINTS.get(trouble, ""))
        return NotSupported(f"{refused}: {answer.splitlines()[0]}")


_HINTS = {
    errno.EACCES: "use port 1024 or higher",
    errno.EADDRNOTAVAIL: "use an address of this host; see: ip address",
}


def _section(text: str) -> str:
    """Return the part of `info usernet` about the machine's netdev: a heading and indented rows."""
    for part in re.split(r"^(?=\S)", text, flags=re.MULTILINE):
        if f"({NETDEV})" in part.partition("\n")[0]:
            return part + "\n"
    return ""


def _is_like(found: Forward, wanted: Forward) -> bool:
    """Return whether two forwards are equal except for the port on the host, which QEMU may have chosen."""
    return found._replace(port=wanted.port) == wanted


def _is_named(found: Forward, wanted: Forward) -> bool:
    return (wanted._replace(guest_port=found.guest_port) if not wanted.guest_port else wanted) == found
