# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests the syntax of forwards, and the errors for invalid ones."""

import contextlib
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.spawn_config import parse_config
from vmspawn.api.options import to_forward
from vmspawn.boot.config import MachineConfig
from vmspawn.boot.config import check_config as check
from vmspawn.errors import UsageError
from vmspawn.host import ports
from vmspawn.network.forward import Forward, parse, parse_host

PORTS = st.integers(1, 65535)
ADDRESSES = st.ip_addresses(v=4).map(str)
FORWARDS = st.builds(Forward, PORTS, st.integers(0, 65535), ADDRESSES, st.sampled_from(("tcp", "udp")))


@given(FORWARDS)
def test_a_forward_is_parsed_as_it_is_written(forward: Forward) -> None:
    assert parse(str(forward)) == forward
    assert parse_host(str(forward)) == forward
    assert parse_host(f"{forward.host}{forward.suffix}") == forward._replace(guest_port=0)


@given(st.text() | st.from_regex(r"[0-9.:/\[\]a-z]{0,30}", fullmatch=True))
def test_any_text_is_a_forward_or_is_refused(text: str) -> None:
    for parser in (parse, parse_host):
        with contextlib.suppress(UsageError):
            found = parser(text)
            assert socket.inet_aton(found.address)
            assert 0 <= found.port < 65536


@pytest.mark.parametrize(
    ("text", "forward"),
    [
        ("8080:80", Forward(80, 8080, "127.0.0.1", "tcp")),
        ("0:22", Forward(22)),
        ("0.0.0.0:53:53/udp", Forward(53, 53, "0.0.0.0", "udp")),
        ("8080:80/tcp", Forward(80, 8080)),
    ],
)
def test_omitted_parts_have_defaults(text: str, forward: Forward) -> None:
    assert parse(text) == to_forward(text) == parse_host(text) == forward


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("80", "not understood"),
        ("8080:0", "out of range"),
        ("70000:80", "out of range"),
        ("8080:80/sctp", "sctp is not known"),
        ("[::1]:8080:80", "IPv4 only"),
        ("localhost:8080:80", "not an IPv4 address"),
        ("127.1:8080:80", "not an IPv4 address"),
        (":8080:80", "the empty text is not an IPv4 address"),
        ("٣:80", "not understood"),
    ],
)
def test_invalid_forwards_are_refused(text: str, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        parse(text)


def test_a_number_is_the_guests_port() -> None:
    assert to_forward(22) == Forward(22)
    with pytest.raises(UsageError, match="out of range"):
        to_forward(0)


def test_a_forward_enables_the_network() -> None:
    config = parse_config(["--guest=builtin", "--forward=8080:80", "--forward=0:53/udp"])
    assert config.forwards == (Forward(80, 8080), Forward(53, 0, protocol="udp"))
    assert config.has_network
    assert not check(MachineConfig(guest="builtin")).has_network
    with pytest.raises(UsageError, match=r"forwards='127.0.0.1:0:0'"):
        check(MachineConfig(guest="builtin", forwards=(Forward(0),)))


@pytest.mark.parametrize("bound", ["127.0.0.1", "0.0.0.0"])
@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_the_process_that_has_a_port_is_found(bound: str, protocol: str) -> None:
    kind = socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM
    with socket.socket(socket.AF_INET, kind) as taken:
        taken.bind((bound, 0))
        if protocol == "tcp":
            taken.listen()
        port = taken.getsockname()[1]
        assert ports.bind_error(protocol, "127.0.0.1", port)
        assert ports.holder(protocol, "127.0.0.1", port).startswith("process ")
        is_seen = ports.holder(protocol, "127.0.0.2", port) != ""
        assert is_seen is (bound == "0.0.0.0")
    assert not ports.bind_error(protocol, "127.0.0.1", port)
    assert ports.holder(protocol, "127.0.0.1", port) == ""
