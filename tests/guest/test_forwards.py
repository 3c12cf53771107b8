# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests traffic through forwarded ports to the built-in guest, which configures its network by DHCP."""

import json
import re
import socket
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.commands import DEADLINE, Spawned, run_example, spawned, vmctl


@pytest.fixture(scope="module")
def machine(qemu: str) -> Iterator[Spawned]:
    """Start a guest with a web server."""
    with spawned("--guest=builtin", f"--qemu={qemu}", "--forward=0:80", "--console=read-only") as running:
        running.wait_for("network eth0: 10.0.2.15", stream="stdout")
        assert vmctl("exec", running.name, "sh", "-c", "echo hello >/tmp/page; httpd -h /tmp").returncode == 0
        yield running


def port_of(machine: Spawned, guest_port: int) -> int:
    found = json.loads(vmctl("list-forwards", machine.name, "--json=short").stdout)
    return int(next(each["port"] for each in found if each["guestPort"] == guest_port))


def page(port: int) -> bytes:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/page", timeout=DEADLINE) as reply:
        return bytes(reply.read())


def test_a_connection_reaches_the_guest(machine: Spawned) -> None:
    port = port_of(machine, 80)
    assert page(port) == b"hello\n"
    assert f"127.0.0.1:{port} is forwarded to port 80 of the guest" in machine.output["stderr"]


def test_a_forward_is_added_to_a_running_machine_and_removed(machine: Spawned) -> None:
    done = vmctl("forward", machine.name, "0:80", "-j")
    port = json.loads(done.stdout)["port"]
    assert page(port) == b"hello\n"
    assert vmctl("forward", machine.name, "--remove", f"{port}:80").returncode == 0
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=DEADLINE)


def test_a_datagram_reaches_the_guest(machine: Spawned) -> None:
    port = json.loads(vmctl("forward", machine.name, "0:9/udp", "-j").stdout)["port"]
    unheard = "awk '/^Udp:/ { number = $3 } END { print number }' /proc/net/snmp"

    def count() -> int:
        """Return the number of datagrams to a port on which no program listens."""
        return int(vmctl("exec", machine.name, "sh", "-c", unheard).stdout)

    before = count()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.sendto(b"datagram", ("127.0.0.1", port))
    deadline = time.monotonic() + DEADLINE
    while count() == before:
        assert time.monotonic() < deadline, "the datagram did not arrive"


def test_the_example_of_the_docs_works(machine: Spawned, tmp_path: Path) -> None:
    """In the docs, the machine is called web."""
    assert vmctl("exec", machine.name, "killall", "httpd").returncode == 0
    done = run_example("network.md", "forwards", tmp_path, {"web": machine.name})
    assert (done.returncode, done.stderr) == (0, "")
    address, *rest = done.stdout.splitlines()
    assert re.fullmatch(r"127\.0\.0\.1:\d+ to port 80", address)
    assert rest[0].split() == ["PROTOCOL", "ADDRESS", "PORT", "GUESTPORT"]
    assert [line.split()[-1] for line in rest if line.startswith("tcp")] == ["80", "80"]
