# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests the facts of docs/qemu.md about ports, slots, targets, namespaces, serial ports and unplug with a bare QEMU."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import MIB, make_raw
from tests.qemu.bare_qemu import Monitor, bare
from tests.qemu.qmp_fixtures import DEADLINE


@pytest.fixture
def q35(qemu: str) -> Iterator[Monitor]:
    with bare(qemu, "q35") as monitor:
        yield monitor


def bus_of(monitor: Monitor, device: str) -> str:
    """Return the path of the bus that a device is on."""
    return str(monitor.succeed("qom-get", path=f"/machine/peripheral/{device}", property="parent_bus"))


# Ports and slots.


@pytest.mark.parametrize("driver", ["virtio-rng-pci", "pcie-root-port"])
@pytest.mark.parametrize("bus", [{}, {"bus": "pcie.0"}])
def test_q35_takes_no_device_on_its_root_bus(q35: Monitor, driver: str, bus: dict[str, str]) -> None:
    """Therefore ports must exist from the start, and each device names its port."""
    assert q35.fail("device_add", driver=driver, id="d0", **bus) == "Bus 'pcie.0' does not support hotplugging"


def test_a_port_that_is_in_use_refuses_a_device_at_slot_0(q35: Monitor) -> None:
    """Without `addr`, QEMU 7.2 accepts the second device, and the guest loses both."""
    q35.succeed("device_add", driver="virtio-rng-pci", id="d0", bus="port0", addr="0x0")
    assert q35.fail("device_add", driver="virtio-rng-pci", id="d1", bus="port0", addr="0x0") == (
        "PCI: slot 0 function 0 not available for virtio-rng-pci, in use by virtio-rng-pci,id=d0"
    )
    assert bus_of(q35, "d0") == "/machine/peripheral/port0/port0"


def test_ports_in_one_slot_take_a_device_each(qemu: str) -> None:
    """Eight functions of one slot of the root bus are eight ports."""
    ports = [f"pcie-root-port,id=p{n},chassis={n + 10},slot={n},addr=0x9.{n},multifunction=on" for n in range(8)]
    with bare(qemu, "q35", *(word for port in ports for word in ("-device", port))) as monitor:
        for n in range(8):
            monitor.succeed("device_add", driver="virtio-rng-pci", id=f"d{n}", bus=f"p{n}", addr="0x0")
            assert bus_of(monitor, f"d{n}") == f"/machine/peripheral/p{n}/p{n}"


def test_two_ports_cannot_share_chassis_and_slot(qemu: str) -> None:
    ports = [word for n in range(2) for word in ("-device", f"pcie-root-port,id=p{n},chassis=1,slot=1")]
    command = [qemu, "-machine", "q35", "-accel", "tcg", "-nodefaults", "-display", "none", "-S", *ports]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE)
    assert done.returncode == 1
    assert "Can't add chassis slot, error -16" in done.stderr


def test_pc_takes_a_device_at_a_free_slot_while_slot_31_is_in_use(qemu: str) -> None:
    """QEMU 11.1 finds no slot by itself then, although some are free."""
    with bare(qemu, "pc") as monitor:
        monitor.succeed("device_add", driver="virtio-rng-pci", id="last", bus="pci.0", addr="0x1f")
        monitor.succeed("device_add", driver="virtio-rng-pci", id="d0", bus="pci.0", addr="0x5")
        assert monitor.fail("device_add", driver="virtio-rng-pci", id="d1", bus="pci.0", addr="0x5") == (
            "PCI: slot 5 function 0 not available for virtio-rng-pci, in use by virtio-rng-pci,id=d0"
        )


# SCSI targets.


def test_a_target_id_is_one_byte(q35: Monitor, tmp_path: Path) -> None:
    q35.add_file(make_raw(tmp_path / "image", MIB), "n0")
    device: dict[str, Any] = {"driver": "scsi-hd", "drive": "n0", "bus": "scsi0.0", "lun": 0}
    assert q35.fail("device_add", id="d0", **device, scsi_id=256) == "bad scsi device id: 256"
    q35.succeed("device_add", id="d0", **device, scsi_id=255)


def test_a_target_that_is_in_use_is_refused(q35: Monitor, tmp_path: Path) -> None:
    for n in range(2):
        q35.add_file(make_raw(tmp_path / f"image{n}", MIB), f"n{n}")
    device: dict[str, Any] = {"driver": "scsi-hd", "bus": "scsi0.0", "scsi_id": 3, "lun": 0}
    q35.succeed("device_add", id="d0", drive="n0", **device)
    assert "already" in q35.fail("device_add", id="d1", drive="n1", **device)


# Unplug.


@pytest.mark.parametrize("machine_type", ["q35", "pc"])
def test_a_scsi_disk_is_removed_without_the_guest(qemu: str, tmp_path: Path, machine_type: str) -> None:
    """There is one event, with `device`; the node can be removed after it."""
    with bare(qemu, machine_type) as monitor:
        monitor.add_file(make_raw(tmp_path / "image", MIB), "n0")
        monitor.succeed("device_add", driver="scsi-hd", id="d0", drive="n0", bus="scsi0.0", scsi_id=0, lun=0)
        monitor.succeed("device_del", id="d0")
        assert monitor.event("DEVICE_DELETED") == {"device": "d0", "path": "/machine/peripheral/d0"}
        monitor.succeed("blockdev-del", node_name="n0")


def test_a_request_before_the_guest_has_run_is_stuck_until_a_reset(q35: Monitor, tmp_path: Path) -> None:
    """The reset then removes the device. For virtio-blk there are two events, the first without `device`."""
    q35.add_file(make_raw(tmp_path / "image", MIB), "n0")
    q35.succeed("device_add", driver="virtio-blk-pci", id="d0", drive="n0", bus="port0", addr="0x0")
    q35.succeed("device_del", id="d0")
    assert q35.fail("device_del", id="d0") == "Device d0 is already in the process of unplug"
    assert q35.fail("blockdev-del", node_name="n0").endswith(" n0 is in use")
    q35.succeed("system_reset")
    assert q35.event("DEVICE_DELETED") == {"path": "/machine/peripheral/d0/virtio-backend"}
    assert q35.event("DEVICE_DELETED") == {"device": "d0", "path": "/machine/peripheral/d0"}
    q35.succeed("blockdev-del", node_name="n0")


def test_a_device_that_does_not_exist_is_not_found(q35: Monitor) -> None:
    """QEMU does not distinguish a device that was removed from one that never existed."""
    missing = {"class": "DeviceNotFound", "desc": "Device 'd0' not found"}
    assert q35.run("device_del", id="d0")["error"] == missing
    q35.succeed("device_add", driver="scsi-cd", id="d0", bus="scsi0.0")
    q35.succeed("device_del", id="d0")
    assert q35.event("DEVICE_DELETED")["device"] == "d0"
    assert q35.run("device_del", id="d0")["error"] == missing


# NVMe namespaces.


def test_namespaces_can_be_plugged_in_where_their_bus_has_a_handler(qemu: str, tmp_path: Path) -> None:
    """vmspawn detects the feature by the handler, which QEMU 11.1 has and 7.2 does not."""
    with bare(qemu, "q35", "-device", "nvme,id=nvme0,serial=x") as monitor:
        for n in range(2):
            monitor.add_file(make_raw(tmp_path / f"image{n}", MIB), f"n{n}")
        device: dict[str, Any] = {"driver": "nvme-ns", "bus": "nvme0", "nsid": 7}
        if not monitor.succeed("qom-get", path="/machine/peripheral/nvme0/nvme0", property="hotplug-handler"):
            assert monitor.fail("device_add", id="d0", drive="n0", **device) == (
                "Bus 'nvme0' does not support hotplugging"
            )
            return
        monitor.succeed("device_add", id="d0", drive="n0", **device)
        assert "7" in monitor.fail("device_add", id="d1", drive="n1", **device)
        monitor.succeed("device_del", id="d0")
        assert monitor.event("DEVICE_DELETED")["device"] == "d0"
        monitor.succeed("blockdev-del", node_name="n0")
        monitor.succeed("device_add", id="d1", drive="n1", **device)


# Serial ports.


def test_a_serial_port_is_plugged_in_and_unplugged_without_the_guest(qemu: str) -> None:
    """getfd passes the port's socket, and chardev-add consumes the name. The port keeps its chardev busy."""
    ours, theirs = socket.socketpair()
    with ours, theirs, bare(qemu, "q35", "-device", "virtio-serial-pci,id=serial,max_ports=4") as monitor:
        monitor.succeed("getfd", fdname="s", fds=[theirs.fileno()])
        backend = {"type": "socket", "data": {"addr": {"type": "fd", "data": {"str": "s"}}, "server": False}}
        monitor.succeed("chardev-add", id="backend0", backend=backend)
        assert monitor.fail("closefd", fdname="s") == "File descriptor named 's' not found"
        port: dict[str, Any] = {"driver": "virtserialport", "chardev": "backend0", "bus": "serial.0"}
        refusal = monitor.fail("device_add", id="d0", **port, nr=4)
        assert refusal.endswith("Out-of-range port id specified, max. allowed: 3")
        monitor.succeed("device_add", id="d0", **port, nr=3)
        assert monitor.fail("chardev-remove", id="backend0") == "Chardev 'backend0' is busy"
        monitor.succeed("device_del", id="d0")
        assert monitor.event("DEVICE_DELETED")["device"] == "d0"
        monitor.succeed("chardev-remove", id="backend0")


def test_a_serial_port_gets_one_socket_after_the_other(qemu: str) -> None:
    """QEMU closes the socket that another one replaces. With the type null, QEMU only closes the socket."""
    null: dict[str, Any] = {"type": "null", "data": {}}
    with bare(qemu, "q35", "-device", "virtio-serial-pci,id=serial,max_ports=4") as monitor:
        monitor.succeed("chardev-add", id="backend0", backend=null)
        monitor.succeed("device_add", id="d0", driver="virtserialport", chardev="backend0", bus="serial.0", nr=1)
        before: socket.socket | None = None
        for close in (False, False, True, False):
            ours, theirs = socket.socketpair()
            ours.settimeout(DEADLINE)
            with theirs:
                monitor.succeed("getfd", fdname="s", fds=[theirs.fileno()])
            backend = {"type": "socket", "data": {"addr": {"type": "fd", "data": {"str": "s"}}, "server": False}}
            monitor.succeed("chardev-change", id="backend0", backend=backend)
            assert monitor.fail("closefd", fdname="s") == "File descriptor named 's' not found"
            if close:
                monitor.succeed("chardev-change", id="backend0", backend=null)
                assert ours.recv(1) == b""
            if before is not None:
                with before:
                    assert before.recv(1) == b""
            before = ours
        ours.close()
        monitor.succeed("device_del", id="d0")
        assert monitor.event("DEVICE_DELETED")["device"] == "d0"
        monitor.succeed("chardev-remove", id="backend0")
