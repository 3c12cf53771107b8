# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests the syntax of storage providers' volumes on the command lines."""

from typing import Any

import pytest

from tests.commands import vmspawn
from vmspawn.cli.volumes import parse
from vmspawn.errors import UsageError


@pytest.mark.parametrize(
    ("text", "config", "parameters"),
    [
        ("fs:a", "", {}),
        ("fs:a:nvme", "nvme", {}),
        ("fs:a:create=new,size=8M", "", {"createMode": "new", "createSizeBytes": 8 << 20}),
        ("fs:a::template=sparse-file", "", {"template": "sparse-file"}),
        ("fs:a:scsi-cd:ro=yes,request-as=reg", "scsi-cd", {"readOnly": True, "requestAs": "reg"}),
        ("fs:a:virtio-scsi:read-only=auto,create-size=1K", "virtio-scsi", {"createSizeBytes": 1024}),
    ],
)
def test_valid_volumes_are_parsed(text: str, config: str, parameters: dict[str, Any]) -> None:
    volume = parse("--bind-volume=", text)
    assert (volume.disk_name, volume.config, volume.parameters) == ("fs:a", config, parameters)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fs", "names no volume"),
        (":a", "names no volume"),
        ("../x:a", "names no volume"),
        ("fs:", "names no volume"),
        ("fs:a:floppy", "unknown bus floppy"),
        ("fs:a:nvme:x:y", "too many parts"),
        ("fs:a:color=red", "unknown key color="),
        ("fs:a:create=maybe", "create=maybe is not known"),
        ("fs:a:request-as=dir", "request-as=dir is not known"),
        ("fs:a:size=big", "is not a size"),
        ("fs:a:ro=perhaps", "neither yes nor no"),
    ],
)
def test_invalid_volumes_are_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        parse("--bind-volume=", text)
    assert caught.value.hint


def test_an_error_names_a_missing_provider(qemu: str) -> None:
    done = vmspawn(f"--qemu={qemu}", "--guest=builtin", "--bind-volume=nowhere:a")
    assert done.returncode == 1
    assert "there is no storage provider nowhere" in done.stderr
