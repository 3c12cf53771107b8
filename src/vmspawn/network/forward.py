# SPDX-License-Identifier: LGPL-2.1-or-later
"""Parses and checks forwards: ports of the host that are forwarded to ports of the guest.

This module is on the start path and imports next to nothing.
"""

from __future__ import annotations

import re
from typing import Self

from ..errors import UsageError
from ..record import Record

#: The netdev of the network card that exists from boot.
NETDEV = "network0-user"

LOOPBACK = "127.0.0.1"
#: All addresses of the host.
ANY_ADDRESS = "0.0.0.0"
PROTOCOLS = ("tcp", "udp")

#: The port of SSH servers.
SSH_PORT = 22

_PORT_MAX = 65535

_SYNTAX = r"(?:(?P<address>[^:/]*|\[.*\]):)?(?P<port>[0-9]{1,5}):(?P<guest>[0-9]{1,5})(?:/(?P<protocol>\w+))?"
_HOST_SYNTAX = r"(?:(?P<address>[^:/]*|\[.*\]):)?(?P<port>[0-9]{1,5})(?:/(?P<protocol>\w+))?"
_HINT = "write [ADDRESS:]PORT:GUESTPORT[/udp], for example 8080:80"


class Forward(Record):
    """A port of the host that is forwarded to a port of the guest. `port` 0 means any free port.

        forward = await machine.forward(vmspawn.Forward(22, port=2222))

    `address` is an IPv4 address of the host; 0.0.0.0 means all addresses.
    """

    guest_port: int
    port: int = 0
    address: str = LOOPBACK
    protocol: str = PROTOCOLS[0]

    def __str__(self) -> str:
        return f"{self.host}:{self.guest_port}{self.suffix}"

    @property
    def host(self) -> str:
        """The address and port on the host."""
        return f"{self.address}:{self.port}"

    @property
    def suffix(self) -> str:
        """The protocol as a suffix of the ports: an empty string for TCP."""
        return "" if self.protocol == PROTOCOLS[0] else f"/{self.protocol}"

    def check(self) -> Self:
        """Return the forward. Raises UsageError if a port, the protocol or the address is invalid."""
        if not 1 <= self.guest_port <= _PORT_MAX or not 0 <= self.port <= _PORT_MAX:
            raise _refuse(
                str(self), "a port is out of range", hint="use 1 to 65535, and 0 for any free port of the host"
            )
        if self.protocol not in PROTOCOLS:
            raise _refuse(str(self), f"the protocol {self.protocol} is not known", hint="use /tcp or /udp")
        if ":" in self.address:
            raise _refuse(str(self), "QEMU forwards IPv4 only", hint=f"use an IPv4 address, such as {LOOPBACK}")
        if not _is_address(self.address):
            address = self.address or "the empty text"
            raise _refuse(str(self), f"{address} is not an IPv4 address", hint="use 0.0.0.0 for all addresses")
        return self


def local_address(forward: Forward) -> str:
    """Return the address at which this host reaches a forward."""
    return LOOPBACK if forward.address == ANY_ADDRESS else forward.address


def is_ssh(forward: Forward) -> bool:
    """Return whether a forward leads to the port of the guest's SSH server."""
    return (forward.guest_port, forward.protocol) == (SSH_PORT, PROTOCOLS[0])


def parse(text: str) -> Forward:
    """Parse `[ADDRESS:]PORT:GUESTPORT[/udp]`. Raises UsageError."""
    found = re.fullmatch(_SYNTAX, text, re.ASCII)
    if found is None:
        raise _refuse(text, "the syntax is not understood", hint=_HINT)
    return Forward(int(found["guest"]), int(found["port"]), *_rest(found)).check()


def parse_host(text: str) -> Forward:
    """Parse a forward to remove: `[ADDRESS:]PORT[:GUESTPORT][/udp]`. The default of the guest's port is 0.

    Raises UsageError.
    """
    found = re.fullmatch(_HOST_SYNTAX, text, re.ASCII)
    if found is None or re.fullmatch(_SYNTAX, text, re.ASCII):
        return parse(text)
    return Forward(1, int(found["port"]), *_rest(found)).check()._replace(guest_port=0)


def _rest(found: re.Match[str]) -> tuple[str, str]:
    address = found["address"]
    return LOOPBACK if address is None else address.strip("[]"), found["protocol"] or PROTOCOLS[0]


def _is_address(text: str) -> bool:
    parts = text.split(".")
    return len(parts) == 4 and all(re.fullmatch("0|[1-9][0-9]{0,2}", each) and int(each) < 256 for each in parts)


def _refuse(text: str, why: str, *, hint: str) -> UsageError:
    return UsageError.with_fields("{forwards={text}}: {why}", hint=hint, text=text, why=why)
