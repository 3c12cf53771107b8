# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests the files of cloud-init's seed, and its image as another program reads it."""

import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.refusals import refused
from tests.spawn_config import parse_config
from vmspawn.boot import cloud_init
from vmspawn.boot.config import MachineConfig
from vmspawn.errors import NotInstalled, StartError
from vmspawn.host import runtime
from vmspawn.host.runtime import MachineDirectory

KEY = "ssh-ed25519 AAAA vmspawn/web"


@pytest.fixture
def directory() -> Iterator[MachineDirectory]:
    made = MachineDirectory.create("seed")
    made.write(runtime.SSH_PUBLIC_KEY, KEY.encode() + b"\n")
    yield made
    made.remove()
    assert not Path(made.path).exists()


def seeded(directory: MachineDirectory, user_data: str = "", *, key: bool = True) -> Path:
    """Make a seed, and return the path of its image."""
    config = MachineConfig(name="my_web", image="/x", cloud_init=user_data, pass_ssh_key=key)
    pytest.importorskip("pycdlib")
    (disk,) = cloud_init.with_seed(config, directory).extra_disks
    assert disk.read_only
    assert stat.S_IMODE(Path(disk.path).stat().st_mode) == 0o600
    return Path(disk.path)


def test_the_instance_changes_with_the_user_data() -> None:
    def instance(name: str, data: bytes) -> str:
        return str(json.loads(cloud_init.seed_files(name, data, KEY)["meta-data"])["instance-id"])

    first = instance("web", b"#cloud-config\n\xff")
    assert first == instance("web", b"#cloud-config\n\xff")
    assert len({first, instance("web", b"#cloud-config\n\xfe"), instance("db", b"#cloud-config\n\xff")}) == 3


def test_another_program_reads_the_image(directory: MachineDirectory, tmp_path: Path) -> None:
    """The image has the label and the long names that cloud-init looks for."""
    if not shutil.which("isoinfo"):
        pytest.skip("isoinfo is not installed")
    data = b"#cloud-config\nruncmd: [[touch, /done]]\n" + b"# " + b"x" * 5000 + b"\n"
    (tmp_path / "user data").write_bytes(data)
    image = seeded(directory, str(tmp_path / "user data"))

    def ask(*arguments: str) -> bytes:
        return subprocess.run(["isoinfo", "-i", str(image), *arguments], capture_output=True, check=True).stdout

    assert b"Volume id: CIDATA\n" in ask("-d")
    for names in ("-R", "-J"):
        assert set(ask("-f", names).split()) == {b"/user-data", b"/meta-data", b"/vendor-data"}
        assert ask(names, "-x", "/user-data") == data
    meta = json.loads(ask("-R", "-x", "/meta-data"))
    assert meta["local-hostname"] == "my-web"
    assert meta["public-keys"] == [KEY]
    assert ask("-R", "-x", "/vendor-data").startswith(b"#cloud-config\n")


def test_a_seed_needs_neither_user_data_nor_a_key(directory: MachineDirectory) -> None:
    image = seeded(directory, key=False).read_bytes()
    assert b"CIDATA" in image
    assert b'"public-keys": []' in image
    assert b"#cloud-config" in image


@pytest.mark.parametrize(
    ("content", "why"), [(None, "No such file"), (b"runcmd: []\n", "without a header"), (b"#" * (17 << 20), "16 MiB")]
)
def test_user_data_that_cannot_be_used_is_refused(
    directory: MachineDirectory, tmp_path: Path, content: bytes | None, why: str
) -> None:
    path = tmp_path / "user-data"
    if content is not None:
        path.write_bytes(content)
    with refused(f"^cannot use --cloud-init={path}: .*{why}", StartError):
        seeded(directory, str(path))


def test_user_data_may_come_from_a_pipe(
    directory: MachineDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a shell's --cloud-init=<(COMMAND). vmspawn stops waiting for a pipe that is never written."""
    script = "echo '#cloud-config'; head -c 200000 /dev/zero | tr '\\0' '#'"
    with subprocess.Popen(["sh", "-c", script], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        data = cloud_init._user_data(f"/dev/fd/{process.stdout.fileno()}")
    assert data == b"#cloud-config\n" + b"#" * 200_000
    monkeypatch.setattr(cloud_init, "_PIPE_TIMEOUT", 0.05)
    os.mkfifo(tmp_path / "pipe")
    with refused("^cannot use --cloud-init=.*/pipe: nothing was written to it for 0.05 s", StartError):
        seeded(directory, str(tmp_path / "pipe"))
    with refused("^cannot use --cloud-init=.*: Is a directory", StartError):
        seeded(directory, str(tmp_path))


def test_an_error_names_the_package_that_is_not_installed(
    directory: MachineDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pycdlib", None)
    config = MachineConfig(name="web", image="/x", cloud_init="")
    with refused("^--cloud-init= needs the Python package pycdlib", NotInstalled) as caught:
        cloud_init.with_seed(config, directory)
    assert "pipx inject vmspawn pycdlib" in caught.value.hint


def test_the_value_of_the_option_follows_an_equals_sign() -> None:
    """The word after an option without an equals sign is a kernel argument."""
    config = parse_config(["--image=/x", "--cloud-init", "quiet"])
    assert (config.cloud_init, config.kernel_arguments, config.pass_ssh_key) == ("", ("quiet",), True)
    config = parse_config(["--image=/x", "--cloud-init=data", "--pass-ssh-key=no"])
    assert (config.cloud_init, config.pass_ssh_key, config.forwards) == ("data", False, ())
    assert parse_config(["--image=/x"]).cloud_init is None
    for options in (["--guest=builtin"], ["--linux=/x"]):
        with refused("^--cloud-init= needs an image"):
            parse_config([*options, "--cloud-init"])
