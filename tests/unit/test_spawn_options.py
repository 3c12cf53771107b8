# SPDX-License-Identifier: LGPL-2.1-or-later
"""Options of systemd-vmspawn: those that are understood in all their forms, and those that can only be gone without."""

import pytest

from vmspawn.cli import later_options
from vmspawn.cli.spawn import build_parser, parse
from vmspawn.errors import UsageError
from vmspawn.machine.memory import Growth, size_argument

GIB = 1 << 30


@pytest.mark.parametrize(
    ("text", "size", "growth", "argument"),
    [
        ("1G", GIB, None, f"size={GIB}B"),
        ("1G:2G", GIB, Growth(2 * GIB, 1), f"size={GIB}B,maxmem={2 * GIB}B,slots=1"),
        ("1G:4G:3", GIB, Growth(4 * GIB, 3), f"size={GIB}B,maxmem={4 * GIB}B,slots=3"),
    ],
)
def test_ram(text: str, size: int, growth: Growth | None, argument: str) -> None:
    config, _ = parse(["--guest=builtin", f"--ram={text}"])
    assert (config.ram, config.ram_growth) == (size, growth)
    assert size_argument(size, growth) == argument


@pytest.mark.parametrize("text", ["2G:1G", "1G:1G", "1G:2G:0", "1G:2G:257", "1G:2G:x", "1G:2G:1:1", ":1G", "1G:"])
def test_what_is_no_ram(text: str) -> None:
    with pytest.raises(UsageError, match="--ram="):
        parse(["--guest=builtin", f"--ram={text}"])


def wishes(*arguments: str) -> list[str]:
    return later_options.check(build_parser().parse_args(list(arguments)))


@pytest.mark.parametrize(
    "argument",
    ["--tpm=no", "--vsock=off", "--tpm-state=auto", "--coco=no", "--pass-ssh-key=no", "--notify-ready=0", "--no-pager"],
)
def test_going_without_is_accepted(argument: str) -> None:
    assert wishes(argument) == []


@pytest.mark.parametrize("argument", ["--tpm=auto", "--vsock=auto"])
def test_auto_goes_without_and_can_say_so(argument: str) -> None:
    (line,) = wishes(argument)
    assert line.startswith(argument)


@pytest.mark.parametrize(
    "argument",
    [
        *("--tpm=yes", "--vsock=1", "--vsock-cid=5", "--tpm-state=/x", "--coco=sev-snp", "--pass-ssh-key=yes"),
        *("--notify-ready=yes", "--network-tap", "-n", "--private-users=65536", "--bind-user=me"),
        *("--forward-journal=/x", "--forward-journal-max-use=1G", "--ssh-key-type=rsa"),
    ],
)
def test_a_firm_wish_is_refused_in_one_line_with_what_to_do(argument: str) -> None:
    with pytest.raises(UsageError, match="is not supported yet") as caught:
        wishes(argument)
    assert "\n" not in str(caught.value)
    assert caught.value.hint


def test_several_initrds() -> None:
    config, _ = parse(["--linux=/k", "--initrd=/a", "--initrd=/b", "--initrd=/c"])
    assert (config.initrd, config.more_initrds) == ("/a", ("/b", "/c"))


@pytest.mark.parametrize(("text", "discard"), [("yes", True), ("off", False)])
def test_discard(text: str, discard: bool) -> None:
    assert parse(["--image=/x", f"--discard-disk={text}"])[0].discard_disk is discard
    with pytest.raises(UsageError, match="--discard-disk=maybe is neither yes nor no"):
        parse(["--image=/x", "--discard-disk=maybe"])
