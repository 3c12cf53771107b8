# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests the configuration for ssh, which ssh itself reads, and the rules of --pass-ssh-key=."""

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.refusals import refused
from tests.spawn_config import parse_config
from vmspawn import MachineConfig
from vmspawn.boot import shares, smbios
from vmspawn.boot.config import check_config
from vmspawn.boot.credentials import Credential
from vmspawn.boot.plan import _credentials
from vmspawn.boot.shares import Share
from vmspawn.network.forward import Forward
from vmspawn.network.openssh import Access, access_of

needs_ssh = pytest.mark.skipif(not shutil.which("ssh"), reason="ssh is not installed")

#: Directories with characters that have a meaning in ssh's configuration.
FOLDERS = ["/run/vmspawn", "/a b", '/a"b', "/a\\b", '/a\\"b', "/100%h", "/#a", "/'a", "/ä"]


def access(folder: str = "/run/vmspawn") -> Access:
    return Access("web", "127.0.0.1", 2222, f"{folder}/ssh-key", f"{folder}/ssh-known-hosts")


def settings_of(arguments: Sequence[str]) -> dict[str, str]:
    """Return the settings that ssh itself reads from its arguments and its configuration."""
    done = subprocess.run(["ssh", "-G", *arguments], capture_output=True, text=True, check=True)
    found = dict(line.partition(" ")[::2] for line in done.stdout.splitlines())
    # ssh replaces %% when it opens a file.
    return {key: value.replace("%%", "%") for key, value in found.items()}


def check_settings(found: dict[str, str], folder: str, user: str) -> None:
    assert (found["hostname"], found["port"], found["user"]) == ("127.0.0.1", "2222", user)
    assert found["identityfile"] == f"{folder}/ssh-key"
    assert found["userknownhostsfile"].strip('"') == f"{folder}/ssh-known-hosts"
    assert found["hostkeyalias"] == "vmspawn/web"
    assert found["stricthostkeychecking"] == "accept-new"
    assert found["identitiesonly"] == "yes"


@needs_ssh
@pytest.mark.parametrize("folder", FOLDERS)
def test_ssh_reads_the_configuration(folder: str, tmp_path: Path) -> None:
    (tmp_path / "config").write_text(access(folder).configuration())
    for name in ("vmspawn/web", "vmspawn-web"):
        check_settings(settings_of(["-F", str(tmp_path / "config"), name]), folder, "root")


@needs_ssh
@pytest.mark.parametrize("folder", FOLDERS)
def test_ssh_reads_the_options(folder: str) -> None:
    check_settings(settings_of(["-F", "none", *access(folder).options("some one")]), folder, "some one")


@needs_ssh
def test_a_proxy_for_all_hosts_is_not_used(tmp_path: Path) -> None:
    for proxy in ("ProxyJump bastion", "ProxyCommand nc %h %p"):
        (tmp_path / "config").write_text(f"{access().configuration()}\nHost *\n    {proxy}\n")
        found = settings_of(["-F", str(tmp_path / "config"), "vmspawn/web"])
        assert found.get("proxyjump", "none") == "none"
        assert found.get("proxycommand", "none") == "none"


@needs_ssh
def test_a_guest_gets_nothing_that_the_user_forwards_to_all_hosts(tmp_path: Path) -> None:
    settings = ("ForwardAgent", "ForwardX11", "UpdateHostKeys")
    users = "\n".join(["Host *", *(f"    {each} yes" for each in settings)])
    (tmp_path / "users").write_text(users)
    (tmp_path / "included").write_text(f"{access().configuration()}\n{users}\n")
    for arguments in (["users", *access().options("root")], ["included", "vmspawn/web"], ["included", "vmspawn-web"]):
        found = settings_of(["-F", f"{tmp_path}/{arguments[0]}", *arguments[1:]])
        # ssh prints UpdateHostKeys as a truth value.
        assert {found[each.lower()] for each in settings} <= {"no", "false"}
    found = settings_of(["-A", "-F", f"{tmp_path}/included", "vmspawn/web"])
    assert found["forwardagent"] == "yes"


def test_ssh_connects_through_the_forward_to_the_server() -> None:
    others = [Forward(80, 1), Forward(22, 2, protocol="udp")]
    assert access_of("web", others, "key") is None
    found = access_of("web", [*others, Forward(22, 3, "0.0.0.0"), Forward(22, 4)], "key")
    assert found is not None
    assert (found.address, found.port) == ("127.0.0.1", 3)


def test_a_key_adds_a_forward_to_the_server() -> None:
    options = ["--image=/x", "--pass-ssh-key=yes"]
    assert parse_config(options).forwards == (Forward(22),)
    assert parse_config([*options, "--forward=80:80"]).forwards == (Forward(80, 80), Forward(22))
    assert parse_config([*options, "--forward=2222:22"]).forwards == (Forward(22, 2222),)
    assert not parse_config(["--image=/x", "--pass-ssh-key=no"]).forwards
    config = parse_config([*options, "--ssh-key-type=rsa"])
    assert (config.pass_ssh_key, config.ssh_key_type) == (True, "rsa")


@pytest.mark.parametrize("more", [(), ("--directory=/", "--directory-rw"), ("--warm",)])
def test_a_guest_without_a_server_is_refused(more: tuple[str, ...]) -> None:
    with refused("^--pass-ssh-key= .*the built-in guest has none"):
        parse_config(["--guest=builtin", "--pass-ssh-key=yes", *more])


def test_the_key_needs_smbios() -> None:
    config = check_config(MachineConfig(image="/x", pass_ssh_key=True, machine_type="virt"))
    assert smbios.needs_uefi(config, "aarch64")


def test_vmspawns_credentials_are_added_to_the_users() -> None:
    config = MachineConfig(
        credentials=(Credential("keys", b"of the user"), Credential("other", b"x")), binds=(Share("/a", "/b", False),)
    )
    own = {"keys": b"ours\n", shares.FSTAB_CREDENTIAL: b"line\n", "none": b""}
    assert list(_credentials(config, own)) == [
        ("keys", b"of the user\nours\n"),
        ("other", b"x"),
        (shares.FSTAB_CREDENTIAL, b"line\n"),
    ]
