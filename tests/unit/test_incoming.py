# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests rewriting a running QEMU's command line for a copy: options for the host are removed, devices are kept."""

import json

from hypothesis import given
from hypothesis import strategies as st

from vmspawn.boot import incoming
from vmspawn.boot.incoming import Option
from vmspawn.hotplug.places import PciPlace

DISK = {"driver": "virtio-blk-pci", "id": "drive0", "drive": "drive0", "bus": "port0", "addr": "0x0"}
RNG = {"driver": "virtio-rng-pci", "id": "rng0", "bus": "pcie.0", "addr": "0x3"}
FLASH = {
    "driver": "raw",
    "node-name": "firmware-variables",
    "read-only": False,
    "file": {"driver": "file", "filename": "/dev/fdset/999998"},
}
BELOW = {"driver": "raw", "node-name": "image-below", "read-only": True, "file": {"filename": "/dev/fdset/999999"}}

LINE = [
    *("/usr/bin/qemu", "-name", "web,process=vmspawn-qemu", "-no-user-config", "-nodefaults"),
    *("-machine", "q35,accel=tcg,smm=on", "-m", "size=1B"),
    *("-chardev", "socket,id=qmp-manager,fd=4,server=on,wait=off", "-mon", "chardev=qmp-manager,mode=control"),
    *("-chardev", "socket,id=qmp-bulk,fd=5,server=on,wait=off", "-object", "monitor-qmp,id=m,chardev=qmp-bulk"),
    *("-device", json.dumps(RNG)),
    *("-add-fd", "fd=9,set=999998", "-blockdev", json.dumps(FLASH)),
    *("-smbios", "type=11,path=/proc/self/fd/12"),
    *("-chardev", "stdio,id=console,signal=off,logfile=/proc/self/fd/7,logappend=on", "-serial", "chardev:console"),
    *("-chardev", "socket,id=size,fd=6,server=on,wait=off"),
    *("-add-fd", "fd=10,set=1000000", "-add-fd", "fd=11,set=999999", "-blockdev", json.dumps(BELOW)),
    *("-object", json.dumps({"qom-type": "throttle-group", "id": "limits0"})),
    *("-blockdev", json.dumps({"driver": "file", "node-name": "image0"})),
    *("-device", json.dumps(DISK), "-incoming", "defer", "-kernel", "/boot/linux"),
]

RECORDED = incoming.record(LINE, "pc-q35-7.2")


def test_options_for_the_host_are_removed_and_devices_stay() -> None:
    names = [option.name for option in RECORDED.options]
    assert names.count(incoming.MONITORS) == names.count(incoming.CONSOLE) == names.count(incoming.SIZE) == 1
    assert "-incoming" not in names
    assert "-name" not in names
    assert [each["id"] for each in incoming.devices(RECORDED.options)] == ["rng0"]
    assert Option("-kernel", "/boot/linux") in RECORDED.options


def test_the_machine_type_is_pinned_with_its_properties() -> None:
    assert incoming.value_of(RECORDED.options, "-machine") == "pc-q35-7.2,accel=tcg,smm=on"


def test_only_descriptors_that_a_copy_needs_are_recorded() -> None:
    assert RECORDED.descriptors == (9, 11, 12)
    assert incoming.writable_descriptors(RECORDED.options) == (9,)


IN_FILE = ["qemu", "-object", "memory-backend-file,id=mem,size=64B,mem-path=/proc/self/fd/13,share=on"]


def test_memory_in_a_file_is_saved_beside_the_state_and_mapped_privately_by_a_copy() -> None:
    recorded = incoming.record(IN_FILE, "pc-q35-7.2")
    assert incoming.ram_file(recorded.options) == 13
    assert incoming.writable_descriptors(recorded.options) == recorded.descriptors == (13,)
    private = list(map(incoming.with_private_memory, recorded.options))
    assert incoming.ram_file(private) == -1
    copy = incoming.rebuild(private, {incoming.DISKS: ()}, {13: 5})
    assert copy == ["-object", "memory-backend-file,id=mem,size=64B,mem-path=/proc/self/fd/5,share=off"]


def test_a_copy_of_a_copy_needs_no_file_with_memory() -> None:
    """The memory of a copy is part of its state, because it is no longer equal to the file's content."""
    recorded = incoming.record([*IN_FILE[:2], IN_FILE[2].replace("share=on", "share=off")], "pc-q35-7.2")
    assert recorded.options[0] == Option("-object", "memory-backend-ram,id=mem,size=64B")
    assert recorded.descriptors == ()


def test_anonymous_memory_is_part_of_the_state() -> None:
    assert incoming.ram_file(RECORDED.options) == -1
    assert tuple(map(incoming.with_private_memory, RECORDED.options)) == RECORDED.options


def test_a_copy_has_descriptors_of_its_own() -> None:
    places = {name: [name] for name in (incoming.MONITORS, incoming.CONSOLE, incoming.SIZE, incoming.DISKS)}
    line = incoming.rebuild(RECORDED.options, places, {9: 109, 11: 111, 12: 112})
    assert "type=11,path=/proc/self/fd/112" in line
    assert "fd=109,set=999998" in line
    assert line[-1] == incoming.DISKS


def test_the_node_below_an_overlay_is_taken_out() -> None:
    rest, node, number = incoming.take_node(RECORDED.options, "image-below")
    assert (node, number) == (BELOW, 11)
    assert len(rest) == len(RECORDED.options) - 2
    assert incoming.take_node(rest, "image-below") == (rest, {}, -1)


def test_all_places_are_claimed() -> None:
    claimed: list[PciPlace] = []
    incoming.claim_places(RECORDED.options, claimed.append)
    assert claimed == [PciPlace("pcie.0", "0x3")]


@given(
    st.lists(st.tuples(st.sampled_from(["-a", "-b", "-device"]), st.text(max_size=8).filter(lambda t: t[:1] != "-")))
)
def test_other_options_are_kept_unchanged(pairs: list[tuple[str, str]]) -> None:
    line = [word for pair in pairs for word in pair]
    recorded = incoming.record(["qemu", *line], "q")
    same = {number: number for number in recorded.descriptors}
    assert incoming.rebuild(recorded.options, {}, same) == line


def test_a_copy_of_a_copy_has_the_same_record() -> None:
    places = {
        incoming.MONITORS: ["-chardev", "socket,id=qmp-manager,fd=4,server=on,wait=off"],
        incoming.CONSOLE: ["-chardev", "stdio,id=console,signal=off"],
        incoming.SIZE: ["-chardev", "socket,id=size,fd=6,server=on,wait=off"],
        incoming.DISKS: ["-device", json.dumps(DISK)],
    }
    numbers = {number: number for number in RECORDED.descriptors}
    again = ["qemu", "-name", "x", *incoming.rebuild(RECORDED.options, places, numbers), "-incoming", "defer"]
    assert incoming.record(again, "pc-q35-7.2") == RECORDED
