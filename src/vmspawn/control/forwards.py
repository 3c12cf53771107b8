# SPDX-License-Identifier: LGPL-2.1-or-later
"""Converts forwards from and to the types of `io.vmspawn.Machine`.

Names are in Varlink's case because they are part of the protocol.
"""

import typing

from asyncvarlink.serviceerrors import InvalidParameter

from ..errors import UsageError
from ..network.forward import LOOPBACK, PROTOCOLS, Forward
from .types import varlink_type

# asyncvarlink evaluates annotations, so this module cannot use `from __future__ import annotations`.


@varlink_type
class PortForward:
    """A port of the host whose connections go to a port of the guest. `protocol` is tcp or udp."""

    address: str
    port: int
    guestPort: int
    protocol: str

    @classmethod
    def of(cls, forward: Forward) -> typing.Self:
        """Return a forward for a client."""
        return cls(forward.address, forward.port, forward.guest_port, forward.protocol)


def to_forward(guest_port: int, port: int | None, address: str | None, protocol: str | None) -> Forward:
    """Return the forward that a client asks for. Raises InvalidParameter."""
    values = {"guestPort": guest_port, "port": port or 0, "address": address, "protocol": protocol}
    forward = Forward(guest_port, port or 0, address or LOOPBACK, protocol or PROTOCOLS[0])
    # The error names the first parameter that is invalid by itself.
    for name, value in values.items():
        try:
            _alone(name, value).check()
        except UsageError:
            raise InvalidParameter(parameter=name) from None
    return forward


def _alone(name: str, value: typing.Any) -> Forward:
    field = {"guestPort": "guest_port"}.get(name, name)
    return Forward(1)._replace(**({field: value} if value is not None else {}))
