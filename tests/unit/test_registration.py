# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests the options for registration and units: their meaning and their contradictions."""

import os
from collections.abc import Iterator

import pytest

from tests.refusals import refused
from tests.spawn_config import parse_config
from vmspawn.cli.values import boolean
from vmspawn.errors import StartError, UsageError
from vmspawn.host import machined, scope
from vmspawn.host.machined import Candidate, Registration


@pytest.fixture
def no_path() -> Iterator[None]:
    """Set PATH to be empty."""
    before = os.environ["PATH"]
    os.environ["PATH"] = ""
    yield
    os.environ["PATH"] = before


def registration(*arguments: str) -> Registration:
    config = parse_config(["--guest=builtin", *arguments])
    return config.registration


@pytest.mark.parametrize("text", ["yes", "1", "true", "on", "Y", "TRUE"])
def test_systemds_spellings_of_yes_are_accepted(text: str) -> None:
    assert boolean("--register=", text) == "yes"


@pytest.mark.parametrize("text", ["no", "0", "false", "off", "n"])
def test_systemds_spellings_of_no_are_accepted(text: str) -> None:
    assert boolean("--register=", text) == "no"


@pytest.mark.parametrize("text", ["", "maybe", "auto", "2"])
def test_invalid_booleans_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="neither yes nor no"):
        boolean("--keep=", text)


def test_a_machine_is_registered_by_default_if_possible() -> None:
    assert registration() == Registration()
    assert registration().mode == "auto"
    assert registration("--register=off").mode == "no"
    assert registration("--register=1").mode == "yes"


def test_root_registers_with_the_systems_machined_and_others_with_their_own() -> None:
    assert registration("--system").user is False
    assert registration("--user").user is True
    assert registration().user == (os.geteuid() != 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--register=perhaps"], "--register=perhaps is neither yes nor no"),
        (["--keep-unit", "--slice=a.slice"], "--slice= needs a scope unit, and --keep-unit makes none"),
        (["--keep-unit", "--property=A=b"], "--property= needs a scope unit, and --keep-unit makes none"),
        (["--property=MemoryMax"], "--property=MemoryMax has no value"),
    ],
)
def test_contradictory_options_are_refused_with_a_hint(arguments: list[str], message: str) -> None:
    with refused(message) as caught:
        registration(*arguments)
    assert caught.value.hint


def test_without_slice_and_properties_qemu_is_started_without_systemd_run() -> None:
    assert scope.prefix(Registration(), "a") == []


def test_a_slice_without_systemd_is_refused(no_path: None) -> None:
    with pytest.raises(StartError, match="need systemd-run, which is not installed"):
        scope.prefix(Registration(slice="a.slice"), "a")


async def test_without_machined_only_an_explicit_registration_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/proc/nonexistent")
    said: list[str] = []

    async def register(mode: str) -> bool:
        wish = Registration(mode=mode, scope="user")
        return await machined.register(wish, Candidate("a", 1, "/c"), said.append)

    assert not await register("auto")
    assert not await register("no")
    assert said == []
    with pytest.raises(StartError, match="systemd-machined does not run"):
        await register("yes")
