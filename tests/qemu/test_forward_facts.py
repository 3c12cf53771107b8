# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests the answers of QEMU's human monitor to commands for forwards (docs/qemu.md, "User-mode network")."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator

import pytest

from tests.qemu.bare_qemu import Monitor, bare

NETDEV = "net0"


@pytest.fixture
def monitor(qemu: str) -> Iterator[Monitor]:
    arguments = ("-netdev", f"user,id={NETDEV}", "-device", f"virtio-net-pci,netdev={NETDEV},romfile=")
    with bare(qemu, "q35", *arguments) as connected:
        yield connected


def human(monitor: Monitor, line: str) -> str:
    return str(monitor.succeed("human-monitor-command", command_line=line))


def forwards(monitor: Monitor) -> list[tuple[str, ...]]:
    text = human(monitor, "info usernet")
    return re.findall(r"^  (TCP|UDP)\[HOST_FORWARD\] +\d+ +(\S+) +(\d+) +10.0.2.15 +(\d+) ", text, re.MULTILINE)


def test_success_is_an_empty_text(monitor: Monitor) -> None:
    assert human(monitor, f"hostfwd_add {NETDEV} tcp:127.0.0.1:0-:22") == ""
    assert human(monitor, f"hostfwd_add {NETDEV} udp:127.0.0.1:0-:53") == ""


def test_the_list_has_the_port_that_was_chosen(monitor: Monitor) -> None:
    human(monitor, f"hostfwd_add {NETDEV} tcp:127.0.0.1:0-:22")
    human(monitor, f"hostfwd_add {NETDEV} tcp:0.0.0.0:0-:23")
    assert f"({NETDEV}):" in human(monitor, "info usernet").splitlines()[0]
    (_, address, port, guest), (_, other_address, _, other_guest) = sorted(forwards(monitor), key=lambda row: row[3])
    assert (address, guest, other_address, other_guest) == ("127.0.0.1", "22", "*", "23")
    with socket.create_connection(("127.0.0.1", int(port)), timeout=10):
        pass


def test_a_refusal_has_no_reason(monitor: Monitor) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        rule = f"tcp:127.0.0.1:{taken.getsockname()[1]}-:22"
        for each in (rule, "tcp:192.0.2.1:0-:22"):
            expected = f"Could not set up host forwarding rule '{each}'\r\n"
            assert human(monitor, f"hostfwd_add {NETDEV} {each}") == expected


def test_ipv6_is_refused(monitor: Monitor) -> None:
    answer = human(monitor, f"hostfwd_add {NETDEV} tcp:[::1]:0-:22")
    assert answer == "Invalid host forwarding rule 'tcp:[::1]:0-:22' (Bad host address)\r\n"


def test_an_unknown_netdev_is_refused(monitor: Monitor) -> None:
    assert human(monitor, "hostfwd_add nobody tcp::0-:22") == "unrecognized netdev id 'nobody'\r\n"


def test_a_forward_is_removed_by_its_port(monitor: Monitor) -> None:
    human(monitor, f"hostfwd_add {NETDEV} tcp:127.0.0.1:0-:22")
    port = forwards(monitor)[0][2]
    for word in ("removed", "not found"):
        answer = human(monitor, f"hostfwd_remove {NETDEV} tcp:127.0.0.1:{port}")
        assert answer == f"host forwarding rule for tcp:127.0.0.1:{port} {word}\r\n"
    assert forwards(monitor) == []
