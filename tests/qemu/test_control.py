# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests the control socket with third-party clients, valid calls and invalid ones."""

import json
import os
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import varlink

from tests.callers import INSTANCE, caller, in_thread, served_machine
from tests.conftest import make_raw
from tests.machines import Machine, Resources, detach_by_reset
from vmspawn.host.runtime import CONTROL

pytestmark = pytest.mark.asyncio(loop_scope="module")

DEFINITIONS = Path(__file__).parents[1] / "definitions"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def machine(qemu: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Machine]:
    async with served_machine(qemu, tmp_path_factory.mktemp("idle"), hotplug_ports=4) as running:
        yield running


def definitions(text: str) -> set[str]:
    """Return the members of an interface definition, without comments, order and white space."""
    bare = re.sub(r"#.*", "", text)
    parts = re.split(r"(?=\b(?:method|error|type|interface)\s)", bare)
    return {"".join(part.split()) for part in parts if part.strip()}


@pytest.mark.parametrize("name", [INSTANCE, "io.systemd.VirtualMachineInstance"])
async def test_introspection_returns_systemds_definitions(machine: Machine, name: str) -> None:
    def describe() -> str:
        with caller(machine) as client:
            found = client.call("org.varlink.service.GetInterfaceDescription", interface=name)
            return str(found["parameters"]["description"])

    expected = (DEFINITIONS / f"{name}.varlink").read_text()
    assert definitions(await in_thread(describe)) == definitions(expected)


async def test_no_interface_has_two_symbols_of_one_name(machine: Machine) -> None:
    """systemd's varlinkctl refuses such an interface."""

    def describe() -> list[str]:
        service = "org.varlink.service"
        with caller(machine) as client:
            names = client.call(f"{service}.GetInfo")["parameters"]["interfaces"]
            found = [client.call(f"{service}.GetInterfaceDescription", interface=name) for name in names]
            return [each["parameters"]["description"] for each in found]

    found = [
        re.findall(r"^(?:type|method|error)\s+(\w+)", description, re.MULTILINE)
        for description in await in_thread(describe)
    ]
    assert any("ListSnapshots" in symbols for symbols in found)
    for symbols in found:
        assert sorted(symbols) == sorted(set(symbols))


async def test_the_reference_client_can_introspect_and_call(machine: Machine) -> None:
    def use() -> tuple[list[str], dict[str, Any]]:
        with varlink.Client(address=f"unix:{machine.directory.file(CONTROL)}") as client:
            with client.open("org.varlink.service") as service:
                interfaces = service.GetInfo()["interfaces"]
            for name in interfaces:
                client.get_interface(name)
            with client.open(INSTANCE) as instance:
                return interfaces, instance.Describe()

    interfaces, described = await in_thread(use)
    assert {INSTANCE, "io.systemd.VirtualMachineInstance", "io.vmspawn.Machine", "org.varlink.service"} <= set(
        interfaces
    )
    assert described == {"running": True, "status": "running"}


async def test_the_reference_client_gets_typed_errors(machine: Machine) -> None:
    def use() -> str:
        with (
            varlink.Client(address=f"unix:{machine.directory.file(CONTROL)}") as client,
            client.open(INSTANCE) as instance,
            pytest.raises(varlink.VarlinkError) as caught,
        ):
            instance.RemoveStorage("nobody")
        return str(caught.value.error())

    assert await in_thread(use) == f"{INSTANCE}.NoSuchStorage"


async def test_pause_and_resume_change_the_reply_of_describe(machine: Machine) -> None:
    def use() -> list[tuple[str, bool]]:
        seen = []
        with caller(machine) as client:
            for method in ("Pause", "Resume"):
                assert client.call(f"{INSTANCE}.{method}") == {}
                found = client.call(f"{INSTANCE}.Describe")["parameters"]
                seen.append((found["status"], found["running"]))
        return seen

    assert await in_thread(use) == [("paused", False), ("running", True)]


async def test_events_begin_with_ready_and_keep_to_the_filter(machine: Machine) -> None:
    def use() -> list[str]:
        with caller(machine) as watcher, caller(machine) as actor:
            subscribe = {"method": f"{INSTANCE}.SubscribeEvents", "parameters": {"filter": ["STOP"]}, "more": True}
            watcher.send(json.dumps(subscribe).encode() + b"\0")
            seen = [watcher.reply()]
            for method in ("Pause", "Resume", "Pause", "Resume"):
                actor.call(f"{INSTANCE}.{method}")
            seen += [watcher.reply(), watcher.reply()]
            assert all(reply["continues"] for reply in seen)
            return [reply["parameters"]["event"] for reply in seen]

    assert await in_thread(use) == ["READY", "STOP", "STOP"]


async def test_subscribing_without_more_is_refused(machine: Machine) -> None:
    def use() -> Any:
        with caller(machine) as client:
            return client.call(f"{INSTANCE}.SubscribeEvents")["error"]

    assert await in_thread(use) == "org.varlink.service.ExpectedMore"


@pytest.mark.parametrize("config", [None, "virtio-blk", "nvme", "virtio-scsi", "scsi-cd"])
async def test_add_storage_takes_a_descriptor(machine: Machine, tmp_path: Path, config: str | None) -> None:
    path = make_raw(tmp_path / "disk")
    before = await Resources.of(machine)

    def add() -> dict[str, Any]:
        with caller(machine) as client, open(path, "r+b") as image:
            parameters = {"fileDescriptorIndex": 0, "name": "pool:disk"} | ({"config": config} if config else {})
            return client.call(f"{INSTANCE}.AddStorage", [image.fileno()], **parameters)

    needs_guest = config not in ("virtio-scsi", "scsi-cd")

    def remove() -> dict[str, Any]:
        timeout = 100_000 if needs_guest else 20_000_000
        with caller(machine) as client:
            return client.call("io.vmspawn.Machine.DetachStorage", name="pool:disk", timeoutUSec=timeout)

    assert await in_thread(add) == {}
    assert [each.disk.bus for each in machine.storage if not each.is_boot] == [config or "virtio-blk"]
    removed = await in_thread(remove)
    if needs_guest and "error" in removed:
        # Firmware releases a PCI device at a reset; the reply came in time nevertheless.
        assert removed["error"] == "io.vmspawn.Machine.StoragePending"
        await detach_by_reset(machine, "pool:disk")
    else:
        assert removed == {"parameters": {"pending": False}}
    assert await Resources.of(machine) == before


#: Flags of open(2) that make a descriptor unusable for a disk.
FLAGS = {"O_PATH": os.O_PATH, "write-only": os.O_WRONLY, "O_SYNC": os.O_RDWR | os.O_SYNC}


@pytest.mark.parametrize("kind", ["O_PATH", "write-only", "O_SYNC", "pipe"])
async def test_add_storage_refuses_descriptors_that_make_no_disk(machine: Machine, tmp_path: Path, kind: str) -> None:
    path = make_raw(tmp_path / "disk")

    def add() -> Any:
        fds = list(os.pipe()) if kind == "pipe" else [os.open(path, FLAGS[kind])]
        try:
            with caller(machine) as client:
                return client.call(f"{INSTANCE}.AddStorage", fds[:1], fileDescriptorIndex=0, name="disk")["error"]
        finally:
            for fd in fds:
                os.close(fd)

    before = await Resources.of(machine)
    assert await in_thread(add) == f"{INSTANCE}.BadConfig"
    assert await Resources.of(machine) == before


@pytest.mark.parametrize(
    ("parameters", "with_fd", "error"),
    [
        ({"fileDescriptorIndex": 0, "name": "disk", "config": "floppy"}, True, f"{INSTANCE}.BadConfig"),
        ({"fileDescriptorIndex": 0, "name": ""}, True, f"{INSTANCE}.BadConfig"),
        ({"fileDescriptorIndex": 1, "name": "disk"}, True, "org.varlink.service.InvalidParameter"),
        ({"fileDescriptorIndex": -1, "name": "disk"}, True, "org.varlink.service.InvalidParameter"),
        ({"fileDescriptorIndex": 0, "name": "disk"}, False, "org.varlink.service.InvalidParameter"),
        ({"fileDescriptorIndex": 0}, True, "org.varlink.service.InvalidParameter"),
        ({"fileDescriptorIndex": 0, "name": 7}, True, "org.varlink.service.InvalidParameter"),
        ({"fileDescriptorIndex": 0, "name": "disk", "more": 1}, True, "org.varlink.service.InvalidParameter"),
    ],
)
async def test_add_storage_refuses_bad_parameters(
    machine: Machine, tmp_path: Path, parameters: dict[str, Any], with_fd: bool, error: str
) -> None:
    path = make_raw(tmp_path / "disk")

    def add() -> Any:
        with caller(machine) as client, open(path, "r+b") as image:
            fds = [image.fileno()] if with_fd else None
            return client.call(f"{INSTANCE}.AddStorage", fds, **parameters)["error"]

    before = await Resources.of(machine)
    assert await in_thread(add) == error
    assert await Resources.of(machine) == before


async def test_a_burst_of_0_percent_is_refused(machine: Machine) -> None:
    (boot,) = (each.name for each in machine.storage)

    def limit(burst: int | None) -> Any:
        with caller(machine) as client:
            limits = {"iops": 1000, "burstPercent": burst}
            return client.call("io.vmspawn.Machine.LimitStorage", name=boot, limits=limits).get("error")

    assert await in_thread(limit, 0) == "io.vmspawn.Machine.BadConfig"
    assert await in_thread(limit, 100) is None
    assert await in_thread(limit, None) is None
