# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests the checks of configurations, and the errors for wrong ones."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmspawn.boot.config import MachineConfig, check_config
from vmspawn.cli.values import parse_size
from vmspawn.errors import UsageError
from vmspawn.host.runtime import NAME_MAX, check_name


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (".5K", 512),
        ("9007199254740993", 9007199254740993),
        ("512M", 512 << 20),
        ("2G", 2 << 30),
        ("2GB", 2 << 30),
        ("1.5G", 3 << 29),
        ("1024", 1024),
        ("4k", 4096),
        ("1T", 1 << 40),
    ],
)
def test_sizes_are_parsed(text: str, size: int) -> None:
    assert parse_size(text, option="--ram=") == size


@pytest.mark.parametrize(
    "text",
    [
        "",
        "G",
        "x",
        "12Q",
        "1GG",
        "--",
        "inf",
        "nan",
        "-1",
        "-1G",
        "8388608T",
        "9" * 30,
        "4_0M",
        "٤M",
        "+4M",
        "1e3",
        " 4",
        "4 ",
        ".",
        "9" * 9999,
    ],
)
def test_invalid_sizes_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"--ram=.* is not a size"):
        parse_size(text, option="--ram=")


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"guest": "builtin"}, "builtin"),
        ({"image": "/x/debian-13.qcow2"}, "debian-13"),
        ({"image": "/x/my image.raw"}, "my-image"),
        ({"linux": "/boot/vmlinuz-6.1"}, "vmlinuz-6.1"),
        ({"image": "/x/...raw"}, "machine"),
        ({"guest": "builtin", "name": "mine"}, "mine"),
    ],
)
def test_a_machine_is_named_after_its_boot_source(options: dict[str, Any], name: str) -> None:
    assert check_config(MachineConfig(**options)).name == name


@given(st.text(max_size=80))
def test_a_name_never_leads_out_of_the_runtime_directory(name: str) -> None:
    try:
        check_name(name)
    except UsageError:
        return
    assert "/" not in name
    assert name not in ("", ".", "..")
    assert len(name) <= NAME_MAX


def test_a_name_has_a_maximum_length() -> None:
    assert check_name("n" * NAME_MAX) == "n" * NAME_MAX
    with pytest.raises(UsageError, match="invalid machine name"):
        check_name("n" * (NAME_MAX + 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "nothing to boot"),
        ({"guest": "builtin", "initrd": "/i"}, "brings its own initrd"),
        ({"initrd": "/i", "image": "/x"}, "initrd= needs linux="),
        ({"guest": "builtin", "cpus": 0}, "cpus=0 is out of range"),
        ({"guest": "builtin", "ram": 1 << 20}, "ram= is too small"),
        ({"guest": "builtin", "uuid": "123"}, "is not a UUID"),
        ({"guest": "builtin", "name": "../x"}, "invalid machine name"),
        ({"guest": "builtin", "machine_type": "isapc"}, "machine_type='isapc' is not known"),
        ({"guest": "builtin", "kvm": "maybe"}, "kvm='maybe' is not known"),
        ({"guest": "other"}, "guest='other' is not known"),
        ({"image": "/a\0b"}, "image= contains a NUL character"),
        ({"image": "/x", "cloud_init": "/a\0b"}, "cloud_init= contains a NUL character"),
        ({"image": "/x", "kernel_arguments": ("a", "b\0")}, "kernel_arguments= contains a NUL character"),
    ],
)
def test_invalid_configurations_are_refused_in_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        check_config(MachineConfig(**options))
    assert "\n" not in str(caught.value)
    assert caught.value.hint
    assert "--" not in f"{caught.value} {caught.value.hint}"
