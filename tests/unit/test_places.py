# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests the accounting of ports, slots, SCSI targets and namespaces."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.refusals import refused
from vmspawn.errors import NoFreePort
from vmspawn.hotplug import places
from vmspawn.hotplug.places import PciPlace, Pool, ScsiPlace, layout, port_devices


def pool_of(count: int) -> Pool:
    return Pool((PciPlace(f"port{n}", "0x0") for n in range(count)), "hot-plug port", "get more")


def test_a_pool_hands_out_each_place_once() -> None:
    pool = pool_of(3)
    assert {pool.take() for _ in range(3)} == set(pool.places)


def test_the_error_of_an_empty_pool_has_the_number_of_places_and_a_hint() -> None:
    pool = pool_of(1)
    pool.take()
    with pytest.raises(NoFreePort, match="all 1 are in use") as caught:
        pool.take()
    assert caught.value.hint == "get more"


def test_the_place_that_was_free_the_longest_is_taken_first() -> None:
    pool = pool_of(3)
    first = pool.take()
    pool.release(first)
    assert pool.take() != first


def test_a_foreign_place_cannot_be_released_into_a_pool() -> None:
    pool = pool_of(1)
    pool.release(PciPlace("elsewhere", "0x0"))
    assert pool.free == 1


@given(st.lists(st.tuples(st.sampled_from(["take", "release", "claim"]), st.integers(0, 4)), max_size=60))
def test_a_pool_never_loses_or_doubles_a_place(steps: list[tuple[str, int]]) -> None:
    pool = pool_of(5)
    taken: set[object] = set()
    for action, index in steps:
        place = pool.places[index]
        if action == "take" and len(taken) < 5:
            got = pool.take()
            assert got not in taken
            taken.add(got)
        elif action == "release":
            pool.release(place)
            taken.discard(place)
        elif action == "claim":
            pool.claim(place)
            taken.add(place)
        assert pool.free == 5 - len(taken)


@pytest.mark.parametrize("count", [0, 1, 8, 9, 64, 120])
def test_q35_has_the_ports_that_were_asked_for_and_no_slot_twice(count: int) -> None:
    found = layout("q35", count)
    assert len(found.pci.places) == found.ports == count
    devices = port_devices(count)
    addresses = [str(device["addr"]) for device in devices]
    assert len(set(addresses)) == count
    port_slots = {int(address.partition(".")[0], 16) for address in addresses}
    boot_slots = {int(place.addr, 16) for place in found.boot.places if isinstance(place, PciPlace)}
    fixed = {0, places.SCSI_CONTROLLER_SLOT, places.RNG_SLOT, 31}
    assert not port_slots & boot_slots
    assert not (port_slots | boot_slots) & fixed


def test_root_ports_differ_in_chassis_and_slot() -> None:
    devices = port_devices(120)
    assert len({(device["chassis"], device["slot"]) for device in devices}) == 120
    assert all(1 <= int(str(device["chassis"])) <= 255 for device in devices)


def test_pc_shares_its_slots_between_boot_and_hot_plug() -> None:
    found = layout("pc", None)
    assert set(found.pci.places) == set(found.boot.places)
    assert len(found.pci.places) == 27
    assert found.ports == 0


@pytest.mark.parametrize(("machine_type", "count"), [("q35", 121), ("q35", -1), ("pc", 28)])
def test_too_many_ports_are_refused_with_the_range(machine_type: str, count: int) -> None:
    with refused(f"--hotplug-ports={count} is out of range") as caught:
        layout(machine_type, count)
    assert "0 to" in caught.value.hint


def test_places_read_as_people_would_write_them() -> None:
    assert str(PciPlace("port3", "0x0")) == "port3"
    assert str(PciPlace("pci.0", "0x5")) == "pci.0:0x5"
    assert str(ScsiPlace("scsi0.0", 7, 0)) == "scsi0:7:0"


def test_a_name_gets_the_same_namespace_each_time() -> None:
    found = layout("q35", None, namespaces=True).namespaces
    place = found.take_for("data")
    found.release(place)
    assert found.take_for("data") == place
    # The name gets another place while this one is in use.
    assert found.take_for("data") != place
    assert found.free == places.NAMESPACES - 2


def test_a_machine_without_namespaces_reports_it() -> None:
    with pytest.raises(NoFreePort, match="no free NVMe namespace: this machine has none"):
        layout("q35", None).namespaces.take_for("data")


@given(st.lists(st.text(min_size=1), max_size=places.NAMESPACES, unique=True))
def test_namespaces_are_handed_out_once_each(names: list[str]) -> None:
    found = layout("pc", None, namespaces=True).namespaces
    assert len({found.take_for(name) for name in names}) == len(names)
