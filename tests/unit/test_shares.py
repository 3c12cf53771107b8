# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests shared directories: their syntax, and the guest's mounts."""

import pytest

from tests.spawn_config import parse_config
from vmspawn.boot.shares import Share, fstab
from vmspawn.cli.spawn.directories import parse_share
from vmspawn.errors import UsageError
from vmspawn.helpers.virtiofsd import Virtiofsd


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("/a", Share("/a", "/a")),
        ("/a:/b", Share("/a", "/b")),
        ("/a/../c/:/d//e/", Share("/c", "/d/e")),
        (r"/a\:b:/c\\d", Share("/a:b", "/c\\d")),
    ],
)
def test_source_and_target_are_parsed(text: str, share: Share) -> None:
    assert parse_share("--bind=", text, read_only=False) == share


@pytest.mark.parametrize("text", ["", ":", "/a:", ":/b", "/a:/b:/c", "/a:b", "/a\\"])
def test_invalid_binds_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--bind="):
        parse_share("--bind=", text, read_only=False)


def test_binds_keep_their_order_and_their_mode() -> None:
    config = parse_config(["--image=/x", "--bind-ro=/a", "--bind=/b:/c d"])
    assert config.binds == (Share("/a", "/a", True), Share("/b", "/c d"))
    assert fstab(config.binds) == b"mnt0 /a virtiofs ro,x-initrd.mount\nmnt1 /c\\040d virtiofs rw,x-initrd.mount\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image=/x", "--directory=/y"], "directory= and image= both"),
        (["--guest=builtin", "--bind=/y"], "needs systemd in the guest"),
        (["--image=/x", "--bind=/a:/t", "--bind-ro=/b:/t"], "/t is bound already"),
    ],
)
def test_contradictory_options_are_refused_with_a_hint(arguments: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        parse_config(arguments)
    assert caught.value.hint


def test_each_virtiofsd_gets_its_own_options() -> None:
    old = Virtiofsd("/v", is_rust=False, can_refuse_writes=False)
    assert old.command("/a,b", 7, read_only=True) == ["/v", "-f", "--fd=7", "-o", "source=/a,,b,xattr"]
    new = Virtiofsd("/v", is_rust=True, can_refuse_writes=True)
    assert new.command("/a", 7, read_only=False)[1:3] == ["--fd=7", "--shared-dir=/a"]
    assert new.command("/a", 7, read_only=True)[-1] == "--readonly"
