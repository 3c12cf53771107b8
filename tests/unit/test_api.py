# SPDX-License-Identifier: LGPL-2.1-or-later
"""The library's names: which there are, that they are typed throughout, and what is said of a wrong one."""

import inspect
import typing
from collections.abc import Iterator
from typing import Any

import pytest

import vmspawn
from vmspawn.api.control import Control
from vmspawn.api.options import MachineOptions


def test_the_names_are_those_that_are_exported() -> None:
    assert dir(vmspawn) == sorted(vmspawn.__all__)
    assert {"Machine", "connect", "Disk", "Limits", "AttachedDisk", "End", "Event"} <= set(vmspawn.__all__)
    for name in vmspawn.__all__:
        assert getattr(vmspawn, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = vmspawn.Nothing  # type: ignore[attr-defined]


def callables(thing: object) -> Iterator[tuple[str, Any]]:
    """A function, or the public methods and properties of a class."""
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
def test_nothing_is_any(name: str) -> None:
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


def test_the_keyword_arguments_are_the_fields_of_a_configuration() -> None:
    assert typing.get_type_hints(MachineOptions) == typing.get_type_hints(vmspawn.MachineConfig)


def test_a_wrong_keyword_is_an_error_of_the_type_checker_too() -> None:
    with pytest.raises(TypeError) as caught:
        vmspawn.Machine(imge="disk.raw")  # type: ignore[call-arg]
    assert str(caught.value) == "Machine() got an unexpected keyword argument 'imge'; did you mean 'image'?"
    with pytest.raises(TypeError, match=r"argument 'xyzzy'$"):
        vmspawn.Machine(xyzzy=1)  # type: ignore[call-arg]


@pytest.mark.parametrize("machine", [vmspawn.Machine, vmspawn.ConnectedMachine])
def test_both_kinds_of_machines_have_the_same_verbs(machine: type) -> None:
    """mypy compares what they return; see the assignments below."""
    verbs = {name: member for name, member in vars(Control).items() if not name.startswith("_")}
    assert len(verbs) > 15
    for name, expected in verbs.items():
        found = inspect.getattr_static(machine, name)
        if isinstance(expected, property):
            assert isinstance(found, property)
            continue
        assert inspect.signature(found).parameters == inspect.signature(expected).parameters, name
        assert inspect.getdoc(found), name


def of_one_shape(machine: vmspawn.Machine, connected: vmspawn.ConnectedMachine) -> list[Control]:
    return [machine, connected]
