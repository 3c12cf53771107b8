# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests credentials: their syntax on the command line, their sources, and the errors for wrong ones."""

import base64
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.refusals import refused
from tests.spawn_config import parse_config
from vmspawn.boot import credentials, smbios
from vmspawn.boot.credentials import Credential, load
from vmspawn.boot.extras import Owned
from vmspawn.cli.credentials import parse_load, parse_set, unescape
from vmspawn.errors import StartError, UsageError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a:", b""),
        ("a:b:c", b"b:c"),
        (r"a:line\nnext", b"line\nnext"),
        (r"a:\x00\xff", b"\0\xff"),
        (r"a:\101\\", b"A\\"),
        (r"a:\u00e9\U0001f600", "é😀".encode()),
        ("a:naïve", "naïve".encode()),
    ],
)
def test_values_may_have_the_escapes_of_c(text: str, value: bytes) -> None:
    assert parse_set(text) == Credential("a", value)


@given(st.binary(max_size=200))
def test_escapes_can_express_any_bytes(value: bytes) -> None:
    assert unescape("", "".join(f"\\x{each:02x}" for each in value)) == value


@given(st.text(alphabet="\\xuU0123456789abn\"' é", max_size=20))
def test_any_text_is_read_or_refused(text: str) -> None:
    with suppress(UsageError):
        unescape("--set-credential=a:", text)


@pytest.mark.parametrize("text", ["novalue", ":x", "a/b:x", "..:x", "ü:x", "n" * 256 + ":x", r"a:\q", "a:\\"])
def test_invalid_credentials_are_refused(text: str) -> None:
    with refused("--set-credential="):
        parse_set(text)


def test_two_credentials_of_one_name_are_refused() -> None:
    with pytest.raises(UsageError, match="two credentials named a"):
        parse_config(["--guest=builtin", "--set-credential=a:1", "--set-credential=a:2"])


def test_a_credential_is_loaded_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"\0secret\n")
    assert load(parse_load(f"a:{tmp_path}/file")) == b"\0secret\n"


def test_a_name_stands_for_a_credential_that_vmspawn_received(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "given").write_bytes(b"x")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    assert load(parse_load("a:given")) == b"x"


def test_a_credential_is_loaded_from_a_socket(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        listener.listen()

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.sendall(b"from a socket")

        thread = threading.Thread(target=serve)
        thread.start()
        assert load(parse_load(f"a:{tmp_path}/socket")) == b"from a socket"
        thread.join()


def test_a_credential_that_cannot_be_loaded_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StartError, match="cannot load the credential a from /proc/nonexistent: No such file"):
        load(parse_load("a:/proc/nonexistent"))
    with (tmp_path / "large").open("wb") as file:
        file.truncate(credentials.TOTAL_MAX + 1)
    with pytest.raises(StartError, match="larger than 1 MiB"):
        load(parse_load(f"a:{tmp_path}/large"))
    with pytest.raises(UsageError, match="names no file"):
        parse_load("a:")


def test_the_guest_gets_a_credential_in_base64() -> None:
    name, _, value = smbios.of_credential("a.b", b"\0\xff").partition(b"=")
    assert name == b"io.systemd.credential.binary:a.b"
    assert base64.b64decode(value) == b"\0\xff"


def test_kernel_arguments_are_for_the_stub_and_the_boot_loader() -> None:
    assert smbios.of_kernel_arguments(()) == []
    assert smbios.of_kernel_arguments(("a", "b=c")) == [
        b"io.systemd.stub.kernel-cmdline-extra=a b=c",
        b"io.systemd.boot.kernel-cmdline-extra=a b=c",
    ]
    with pytest.raises(StartError, match="the kernel arguments are 2048 bytes, and a kernel takes 2047"):
        smbios.check_kernel_arguments(("x" * 2048,))


@pytest.fixture
def owned() -> Iterator[Owned]:
    with ExitStack() as lent:
        yield Owned(ExitStack(), lent)


def test_credentials_without_room_in_the_table_go_by_fw_cfg(owned: Owned) -> None:
    extras = smbios.extras((), (("small", b"x"), ("large", bytes(smbios.TOTAL_MAX))), owned)
    by_fw_cfg = [each for each in extras.arguments if each.startswith("name=")]
    assert [each.partition(",")[0] for each in by_fw_cfg] == ["name=opt/io.systemd.credentials/large"]
    assert extras.arguments.count("-smbios") == 1
    with pytest.raises(StartError, match="cannot be passed in another way"):
        smbios.extras((), (("n" * 40, bytes(smbios.TOTAL_MAX)),), owned)


def test_strings_that_would_be_lost_are_refused(owned: Owned) -> None:
    with pytest.raises(StartError, match="longer than 60000 bytes"):
        smbios.extras([bytes(smbios.TOTAL_MAX + 1)], (), owned)


def test_secrets_are_not_on_the_command_line(owned: Owned) -> None:
    extras = smbios.extras([b"secret"], (), owned)
    assert not any("secret" in each for each in extras.arguments)
    fd = extras.descriptors[0]
    assert os.pread(fd, 100, 0) == b"secret"
    owned.lent.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_optional_credentials_take_no_room_from_others() -> None:
    users = [("a", b"x" * 10_000)]
    ours = [("b", b"y" * 10_000), ("c", b"z")]
    assert smbios.with_optional([], users, ours) == [*users, *ours]
    crowded = [("a", b"x" * 40_000)]
    assert smbios.with_optional([], crowded, ours) == crowded
    # A credential that goes by fw_cfg takes no room.
    large = [("a", b"x" * 60_000)]
    assert smbios.with_optional([], large, ours) == [*large, *ours]
