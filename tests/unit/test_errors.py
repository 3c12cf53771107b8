# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests that errors spell fields for Python and for the command line, and that hints are shown once."""

import functools
import socket
import sys
import traceback
from errno import EIO

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmspawn.cli.ctl import qmp
from vmspawn.cli.ctl.replies import failing_to
from vmspawn.cli.spelling import as_option
from vmspawn.errors import NotInstalled, QmpError, StartError, SystemFailure, UsageError, VmspawnError

VMSPAWN = functools.partial(as_option, "vmspawn")
VMCTL = functools.partial(as_option, "vmctl")


@pytest.mark.parametrize(
    ("template", "python", "option"),
    [
        ("{machine_type=} is wrong", "machine_type= is wrong", "--machine-type= is wrong"),
        ("{machine_type=pc}", "machine_type='pc'", "--machine-type=pc"),
        ("{console={text}}", "console='gui'", "--console=gui"),
        ("{cpus={count}}: {text}", "cpus=500: gui", "--cpus=500: gui"),
        ("{ephemeral=True}", "ephemeral=True", "--ephemeral"),
        ("{discard_disk=False}", "discard_disk=False", "--discard-disk=no"),
        ("{console_log={text}}", "console_log='gui'", "--log=gui"),
        ("{firmware.kind=uefi}", "firmware.kind='uefi'", "--firmware=uefi"),
        ("{ no } {} {x", "{ no } {} {x", "{ no } {} {x"),
    ],
)
def test_a_field_is_spelled_for_python_and_for_the_command_line(template: str, python: str, option: str) -> None:
    error = UsageError.with_fields(template, hint=template, text="gui", count=500)
    assert (str(error), error.hint) == (python, python)
    assert error.spelled(VMSPAWN) == (option, option)


def test_each_command_has_options_of_its_own() -> None:
    error = UsageError.with_fields("{name=x} {size={size}} {thread=True}", size=5)
    assert error.spelled(VMSPAWN)[0] == "--machine=x --size=5 --thread"
    assert error.spelled(VMCTL)[0] == "NEW x SIZE 5 --iothread"


@given(st.text())
def test_untrusted_text_is_never_a_template(text: str) -> None:
    for each in (text, "{cpus=}", "{text}"):
        assert UsageError(each, hint=each).spelled(VMSPAWN) == (each, each)
        assert UsageError.with_fields("{text}", text=each).spelled(VMSPAWN) == (each, "")


def test_a_template_without_its_value_is_a_programming_error() -> None:
    with pytest.raises(KeyError, match="text"):
        UsageError.with_fields("{text}")


def test_a_prefix_names_the_failed_operation_and_keeps_the_class() -> None:
    error: VmspawnError
    for error in (UsageError("bad"), SystemFailure("bad", EIO), QmpError("x", "GenericError", "bad")):
        before = str(error)
        with pytest.raises(type(error)) as caught, failing_to("attach", "/x"):
            raise error
        assert caught.value is error
        assert str(error) == f"cannot attach /x: {before}"
    opening = StartError("cannot open /x: No such file")
    with pytest.raises(StartError), failing_to("attach", "/x"):
        raise opening
    assert str(opening) == "cannot attach /x: No such file"
    with pytest.raises(UsageError) as named, failing_to("start", "/x"):
        raise UsageError.with_fields("{cpus=} is wrong", hint="leave out {cpus=}")
    assert named.value.spelled(VMSPAWN) == ("cannot start /x: --cpus= is wrong", "leave out --cpus=")


@pytest.mark.parametrize("make", [StartError, StartError.with_fields])
def test_the_hint_is_shown_once_in_a_traceback(make: type[VmspawnError]) -> None:
    hint = "try again"
    try:
        try:
            raise make("it failed", hint=hint)
        except VmspawnError:
            raise
    except StartError as error:
        shown = "".join(traceback.format_exception(error))
    assert shown.endswith("StartError: it failed\ntry again\n")
    assert shown.count(hint + "\n") == 1


def test_the_qmp_shell_names_the_command_that_installs_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    # The import system raises ModuleNotFoundError for None.
    monkeypatch.setitem(sys.modules, "prompt_toolkit", None)
    monkeypatch.delitem(sys.modules, "vmspawn.cli.ctl.qmp_shell", raising=False)
    with socket.socket() as unused, pytest.raises(NotInstalled) as caught:
        qmp._shell(unused, b"", "demo")
    assert "pipx inject vmspawn prompt_toolkit" in caught.value.hint
