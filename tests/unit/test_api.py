# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests the library's public names: their list, their types, their documentation, and the errors for wrong names."""

import inspect
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import vmspawn
from tests.conftest import MIB
from vmspawn.api.control import Control
from vmspawn.api.options import DiskOptions, MachineOptions
from vmspawn.boot.config import check_config


def test_dir_lists_the_exported_names() -> None:
    assert dir(vmspawn) == sorted([*vmspawn.__all__, "sync"])
    assert dir(vmspawn.sync) == sorted(vmspawn.sync.__all__)
    assert {"Machine", "connect", "Disk", "Limits", "AttachedDisk", "End", "Event"} <= set(vmspawn.__all__)
    for name in vmspawn.__all__:
        assert getattr(vmspawn, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = vmspawn.Nothing  # type: ignore[attr-defined]


def callables(thing: object) -> Iterator[tuple[str, Any]]:
    """Yield a function, or the public methods and properties of a class."""
    if not inspect.isclass(thing):
        yield getattr(thing, "__name__", ""), thing
        return
    is_protocol = getattr(thing, "_is_protocol", False)
    for name, member in vars(thing).items():
        member = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
        is_public = not name.startswith("_") or (name in ("__init__", "__aenter__") and not is_protocol)
        if inspect.isfunction(member) and is_public:
            yield f"{thing.__name__}.{name}", inspect.unwrap(member)


def contains_any(hint: object) -> bool:
    return hint is Any or any(contains_any(each) for each in typing.get_args(hint))


@pytest.mark.parametrize("name", sorted(vmspawn.__all__))
def test_every_parameter_and_result_has_a_type_that_is_not_any(name: str) -> None:
    thing = getattr(vmspawn, name)
    if inspect.isclass(thing):
        for field, hint in typing.get_type_hints(thing).items():
            assert not contains_any(hint), f"{name}.{field}"
    for what, function in callables(thing):
        hints = typing.get_type_hints(function)
        parameters = [each for each in inspect.signature(function).parameters if each not in ("self", "cls")]
        for parameter in (*parameters, *(() if what.endswith("__init__") else ("return",))):
            assert parameter in hints, f"{what}: {parameter} has no type"
            assert not contains_any(hints[parameter]), f"{what}: {parameter}"


def test_the_keyword_arguments_are_the_fields_of_a_configuration_and_of_a_disk() -> None:
    assert set(typing.get_type_hints(MachineOptions)) == set(vmspawn.MachineConfig._fields)
    assert set(typing.get_type_hints(DiskOptions)) == set(vmspawn.Disk._fields) - {"path"}


def test_the_fields_of_a_configuration_make_the_same_configuration() -> None:
    config = check_config(
        vmspawn.MachineConfig(guest="builtin", ram=64 * MIB, extra_disks=(vmspawn.Disk("/a/b", "c"),))
    )
    options: dict[str, Any] = config._asdict()
    assert vmspawn.Machine(**options).config == config


def test_keyword_arguments_accept_the_forms_of_python_and_of_the_command_line() -> None:
    machine = vmspawn.Machine(
        image=Path("/images/disk.raw"),
        ram="512M",
        grow_image="1.5G",
        kvm=False,
        extra_disks=["qcow2:nvme:/data/x.qcow2", Path("/data/y:z"), vmspawn.Disk("/data/w", "w")],
        kernel_arguments=["quiet", "debug"],
        firmware="bios",
    )
    config = machine.config
    assert (config.name, config.image, config.ram, config.grow_image) == (
        "disk",
        "/images/disk.raw",
        512 * MIB,
        3 << 29,
    )
    assert (config.kvm, config.kernel_arguments, config.firmware.kind) == ("no", ("quiet", "debug"), "bios")
    found = [(each.path, each.name, each.bus, each.format) for each in config.extra_disks]
    assert found == [
        ("/data/x.qcow2", "x.qcow2", "nvme", "qcow2"),
        ("/data/y:z", "y:z", "virtio-blk", None),
        ("/data/w", "w", "virtio-blk", None),
    ]


def test_a_wrong_value_is_refused_by_its_field() -> None:
    with pytest.raises(vmspawn.UsageError, match=r"^ram='12Q' is not a size(\n|$)") as caught:
        vmspawn.Machine(guest="builtin", ram="12Q")
    assert caught.value.__notes__ == ["write for example 512M or 2G"]
    with pytest.raises(TypeError, match=r"^ram= must be bytes or a text such as '512M', not float(\n|$)"):
        vmspawn.Machine(guest="builtin", ram=0.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^kernel_arguments= must be a list or a tuple, not str(\n|$)"):
        vmspawn.Machine(guest="builtin", kernel_arguments="quiet")
    with pytest.raises(vmspawn.UsageError, match=r"^machine_type='i440fx' is not known(\n|$)"):
        vmspawn.Machine(guest="builtin", machine_type="i440fx")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", vmspawn.MachineConfig._fields)
def test_a_value_of_a_wrong_type_is_refused_by_its_field(name: str) -> None:
    options: dict[str, Any] = {name: object()}
    with pytest.raises(TypeError, match=rf"^{name}= must be .*, not object$"):
        vmspawn.Machine(**options)


@pytest.mark.parametrize(("name", "value"), [("agent", "no"), ("cpus", True), ("cpus", 1.5), ("time_limit", "90s")])
def test_values_are_not_converted_to_unlike_types(name: str, value: object) -> None:
    options: dict[str, Any] = {name: value}
    with pytest.raises(TypeError, match=rf"^{name}= must be .*, not {type(value).__name__}$"):
        vmspawn.Machine(**options)


def test_values_have_a_short_repr() -> None:
    assert repr(vmspawn.Disk("a.raw", bus="nvme")) == "Disk(path='a.raw', bus='nvme')"
    assert repr(vmspawn.Limits(iops=5)) == "Limits(iops=5)"
    assert repr(vmspawn.MachineConfig(guest="builtin", ram=1)) == "MachineConfig(guest='builtin', ram=1)"
    assert repr(vmspawn.Machine(guest="builtin", name="x")) == "<Machine 'x', not started>"
    assert repr(vmspawn.ConnectedMachine("x")) == "<ConnectedMachine 'x'>"
    assert repr(vmspawn.Completed(0, "hi\n", "")) == "Completed(status=0, stdout='hi\\n', stderr='')"
    assert len(repr(vmspawn.Completed(0, b"x" * 10_000, b"y" * 10_000))) < 500


@pytest.mark.parametrize("name", sorted(vmspawn.__all__))
def test_every_name_is_documented(name: str) -> None:
    thing = getattr(vmspawn, name)
    assert inspect.getdoc(thing)
    if inspect.isclass(thing):
        # NamedTuple's own docstring lists only the fields.
        assert not (inspect.getdoc(thing) or "").startswith(f"{name}("), name
    for what, function in callables(thing):
        if not what.endswith(("__init__", "__aenter__")):
            assert inspect.getdoc(function), what


@pytest.mark.parametrize("name", sorted(vmspawn.__all__))
def test_every_class_shows_how_it_is_used(name: str) -> None:
    thing = getattr(vmspawn, name)
    if inspect.isclass(thing) and not issubclass(thing, Exception):
        assert re.search(r"\n\n {8}\S", thing.__doc__ or ""), f"the docstring of {name} has no example"


def test_a_wrong_keyword_is_an_error_of_the_type_checker_too() -> None:
    with pytest.raises(TypeError) as caught:
        vmspawn.Machine(imge="disk.raw")  # type: ignore[call-arg]
    assert str(caught.value) == "Machine() got an unexpected keyword argument 'imge'; did you mean 'image'?"
    with pytest.raises(TypeError, match=r"argument 'xyzzy'$"):
        vmspawn.Machine(xyzzy=1)  # type: ignore[call-arg]


@pytest.mark.parametrize("machine", [vmspawn.Machine, vmspawn.ConnectedMachine])
def test_both_kinds_of_machines_have_the_same_verbs(machine: type) -> None:
    """mypy checks the types of the results, in `as_controls`."""
    verbs = {name: member for name, member in vars(Control).items() if not name.startswith("_")}
    assert len(verbs) > 15
    for name, expected in verbs.items():
        found = inspect.getattr_static(machine, name)
        if isinstance(expected, property):
            assert isinstance(found, property)
            assert inspect.getdoc(found), name
            continue
        assert inspect.signature(found).parameters == inspect.signature(expected).parameters, name
        assert inspect.getdoc(found), name


def as_controls(machine: vmspawn.Machine, connected: vmspawn.ConnectedMachine) -> list[Control]:
    return [machine, connected]
