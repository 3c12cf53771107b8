# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests varlinkctl on a machine's control socket: it lists, calls, streams and upgrades."""

import json
import subprocess
from typing import IO

from tests.interop.box import Box
from tests.interop.machines import BoxedMachine

INSTANCE = "io.systemd.MachineInstance"
TIMEOUT = 60.0


def next_event(stream: IO[str]) -> str:
    """Return the name of the next event of a JSON-SEQ stream (RFC 7464), whose texts begin with a record separator."""
    return str(json.loads(stream.readline().lstrip("\x1e"))["event"])


def test_interfaces_and_methods_are_listed(box: Box, idle: BoxedMachine) -> None:
    interfaces = box.run("varlinkctl", "list-interfaces", idle.control).stdout.split()
    assert {INSTANCE, "io.systemd.VirtualMachineInstance", "io.vmspawn.Machine", "org.varlink.service"} <= set(
        interfaces
    )
    methods = box.run("varlinkctl", "list-methods", idle.control, INSTANCE).stdout.split()
    assert f"{INSTANCE}.PowerOff" in methods
    assert f"{INSTANCE}.AddStorage" in methods


def test_varlinkctl_finds_each_introspected_interface_valid(box: Box, idle: BoxedMachine) -> None:
    for interface in box.run("varlinkctl", "list-interfaces", idle.control).stdout.split():
        text = box.run("varlinkctl", "introspect", idle.control, interface).stdout
        assert f"interface {interface}" in text
        validated = subprocess.run(
            box.command("varlinkctl", "validate-idl", "/dev/stdin"),
            input=text,
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            check=False,
        )
        assert validated.returncode == 0, validated.stderr


def test_call_prints_the_reply(idle: BoxedMachine) -> None:
    assert idle.call(f"{INSTANCE}.Describe") == {"running": True, "status": "running"}


def test_an_error_is_reported_by_its_name(box: Box, idle: BoxedMachine) -> None:
    done = box.run("varlinkctl", "call", idle.control, f"{INSTANCE}.RemoveStorage", '{"name":"none"}', check=False)
    assert done.returncode != 0
    assert f"{INSTANCE}.NoSuchStorage" in done.stderr


def test_more_streams_events(box: Box, idle: BoxedMachine) -> None:
    command = box.command(
        *("varlinkctl", "call", "--more", "--json=short", idle.control, f"{INSTANCE}.SubscribeEvents", "{}")
    )
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as stream:
        assert stream.stdout is not None
        assert next_event(stream.stdout) == "READY"
        idle.machinectl("pause")
        assert next_event(stream.stdout) == "STOP"
        stream.terminate()


def test_upgrade_makes_the_connection_a_qmp_session(box: Box, idle: BoxedMachine) -> None:
    commands = '{"execute":"qmp_capabilities"}{"execute":"query-status","id":"mine"}'
    done = subprocess.run(
        box.command("varlinkctl", "call", "--upgrade", idle.control, "io.systemd.QemuMachineInstance.AcquireQMP", "{}"),
        input=commands,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    replies = [json.loads(line) for line in done.stdout.splitlines()]
    assert "QMP" in replies[0]
    assert [reply["return"]["status"] for reply in replies if reply.get("id") == "mine"] == ["running"]


def test_push_fd_adds_a_disk(box: Box, idle: BoxedMachine) -> None:
    box.run("truncate", "--size=4M", f"/var/tmp/{idle.name}-pushed")
    pushed = (
        f"exec 7<>/var/tmp/{idle.name}-pushed; varlinkctl call --push-fd=7 {idle.control} {INSTANCE}.AddStorage "
        """'{"fileDescriptorIndex":0,"name":"pushed"}'"""
    )
    box.run("bash", "-c", pushed)
    disks = idle.call("io.vmspawn.Machine.ListStorage")["storage"]
    assert "pushed" in [disk["name"] for disk in disks]


def test_exec_hands_the_descriptor_to_a_program(box: Box, idle: BoxedMachine) -> None:
    """`--exec` puts the descriptors of the reply where sd_listen_fds(3) looks for them."""
    program = "import socket; print(socket.socket(fileno=3).recv(4096).decode())"
    done = box.run(
        *("varlinkctl", "call", "--exec", idle.control, "io.systemd.QemuMachineInstance.AcquireQMP", "{}"),
        *("--", "python3", "-c", program),
    )
    assert '"QMP"' in done.stdout
