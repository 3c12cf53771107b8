# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests the options of systemd-vmspawn: supported ones in all their forms, and ones that can only be disabled."""

import pytest

from tests.refusals import refused
from tests.spawn_config import parse_config
from vmspawn.boot.memory import Growth, size_argument
from vmspawn.cli.spawn import unsupported_options
from vmspawn.cli.spawn.disks import without_effect
from vmspawn.cli.spawn.main import build_parser, configure
from vmspawn.errors import UsageError, VmspawnError
from vmspawn.version import VERSION

GIB = 1 << 30


@pytest.mark.parametrize(
    ("text", "size", "growth", "argument"),
    [
        ("1G", GIB, None, f"size={GIB}B"),
        ("1G:2G", GIB, Growth(2 * GIB, 1), f"size={GIB}B,maxmem={2 * GIB}B,slots=1"),
        ("1G:4G:3", GIB, Growth(4 * GIB, 3), f"size={GIB}B,maxmem={4 * GIB}B,slots=3"),
    ],
)
def test_ram_has_a_size_a_maximum_and_slots(text: str, size: int, growth: Growth | None, argument: str) -> None:
    config = parse_config(["--guest=builtin", f"--ram={text}"])
    assert (config.ram, config.ram_growth) == (size, growth)
    assert size_argument(size, growth) == argument


@pytest.mark.parametrize("text", ["2G:1G", "1G:1G", "1G:2G:0", "1G:2G:257", "1G:2G:x", "1G:2G:1:1", ":1G", "1G:"])
def test_invalid_ram_is_refused(text: str) -> None:
    with refused("--ram="):
        parse_config(["--guest=builtin", f"--ram={text}"])


def check_unsupported(*arguments: str) -> list[str]:
    return unsupported_options.check(build_parser().parse_args(list(arguments)))


@pytest.mark.parametrize(
    "argument",
    ["--tpm=no", "--vsock=off", "--tpm-state=auto", "--coco=no", "--notify-ready=0", "--no-pager"],
)
def test_values_that_disable_a_feature_are_accepted(argument: str) -> None:
    assert check_unsupported(argument) == []


@pytest.mark.parametrize("argument", ["--tpm=auto", "--vsock=auto"])
def test_auto_disables_a_feature_and_reports_it(argument: str) -> None:
    (line,) = check_unsupported(argument)
    assert line.startswith(argument)


@pytest.mark.parametrize(
    "argument",
    [
        *("--tpm=yes", "--vsock=1", "--vsock-cid=5", "--tpm-state=/x", "--coco=sev-snp"),
        *("--notify-ready=yes", "--network-tap", "-n", "--private-users=65536", "--bind-user=me"),
        *("--bind-user-shell=yes", "--bind-user-shell=/bin/zsh", "--bind-user-group=mine", "--background=44"),
        *("--forward-journal=/x", "--forward-journal-max-use=1G", "--forward-journal-keep-free=1G"),
        *("--forward-journal-max-file-size=1M", "--forward-journal-max-files=3"),
    ],
)
def test_an_unsupported_option_is_refused_in_one_line_with_a_hint(argument: str) -> None:
    with pytest.raises(UsageError, match="is not supported yet") as caught:
        check_unsupported(argument)
    assert "\n" not in str(caught.value)
    assert caught.value.hint


def test_extra_disks_use_the_images_bus_by_default() -> None:
    disks = ("--extra-drive=/a", "--extra-drive=qcow2:/b", "--extra-drive=virtio-blk:/c")
    config = parse_config(["--image=/x", *disks, "--image-disk-type=nvme"])
    assert [each.bus for each in config.extra_disks] == ["nvme", "nvme", "virtio-blk"]


def test_options_without_effect_on_an_optical_image_are_reported() -> None:
    options = ("--ephemeral", "--grow-image=1G", "--discard-disk=no")
    optical = parse_config(["--image=/x", *options, "--image-disk-type=scsi-cd"])
    assert [line.split()[0] for line in without_effect(optical)] == ["--ephemeral", "--grow-image=", "--discard-disk="]
    assert not list(without_effect(parse_config(["--image=/x", *options])))


def test_version_and_help_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    for option, start in (("--version", f"vmspawn {VERSION}\n"), ("--help", "usage: vmspawn [OPTION…]")):
        with pytest.raises(SystemExit, match="0"):
            parse_config([option])
        assert capsys.readouterr().out.startswith(start)


@pytest.mark.parametrize(("text", "kvm"), [("yes", "yes"), ("1", "yes"), ("off", "no"), ("auto", "auto"), ("", "auto")])
def test_kvm_is_one_of_systemds_booleans_or_auto(text: str, kvm: str) -> None:
    assert parse_config(["--guest=builtin", f"--kvm={text}"]).kvm == kvm


def test_the_former_names_of_options_are_known() -> None:
    former = ("--qemu-smp=3", "--qemu-mem=1G", "--qemu-kvm=no", "--qemu-vsock=no", "--qemu-gui")
    config = parse_config(["--guest=builtin", *former])
    assert (config.cpus, config.ram, config.kvm, config.console) == (3, GIB, "no", "gui")
    assert check_unsupported("--qemu-vsock=auto")


def test_an_empty_path_is_none() -> None:
    config = parse_config(["--image=/x", "--linux=", "--initrd=", "--directory=", "--machine="])
    assert (config.linux, config.initrd, config.directory, config.name) == (None, None, None, "x")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kvm=maybe"], "--kvm=maybe is neither yes nor no"),
        (["--shutdown-timeout=-1"], "--shutdown-timeout=-1 is not a number of seconds"),
        (["--shutdown-timeout=nan"], "--shutdown-timeout=nan is not a number of seconds"),
        (["--uuid=00000000-0000-0000-0000-000000000000"], "is the nil UUID"),
        (["--bind=/a:/"], "--bind=/a:/ would hide the guest's root"),
        (["--bind-ro=/"], "--bind-ro=/ would hide the guest's root"),
    ],
)
def test_invalid_values_are_refused_with_a_hint(arguments: list[str], message: str) -> None:
    with refused(message) as caught:
        parse_config(["--image=/x", *arguments])
    assert caught.value.hint


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--imgae=/x"], "did you mean --image?"),
        (["--dirctory=/x"], "did you mean --directory?"),
        (["--nonsense"], "see: vmspawn --help"),
        (["--quiet", "--verbose"], "not allowed with argument"),
        (["--image"], "expected one argument"),
    ],
)
def test_unknown_options_get_a_hint(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        parse_config(arguments)
    said = capsys.readouterr().err
    assert message in said
    assert len(said.splitlines()) == 2


@pytest.mark.parametrize(
    ("argument", "name"),
    [
        ("--image=/x", "--image="),
        ("-x", "--ephemeral"),
        ("--user", "--user"),
        ("--firmware-features=a", "--firmware-features="),
        ("--bind=/a", "--bind="),
        ("--cpus=2", "--cpus="),
        ("--tpm=no", "--tpm="),
    ],
)
def test_an_adoption_refuses_options_that_configure_the_start(argument: str, name: str) -> None:
    parse_config(["--adopt", "-M", "a", "--console=headless", "--log=/l", "--shutdown-timeout=1", "--quiet"])
    with pytest.raises(UsageError, match=f"and {name} configures its start"):
        parse_config(["--adopt", "-M", "a", argument])


def test_several_initrds_are_accepted() -> None:
    config = parse_config(["--linux=/k", "--initrd=/a", "--initrd=/b", "--initrd=/c"])
    assert (config.initrd, config.more_initrds) == ("/a", ("/b", "/c"))


@pytest.mark.parametrize(("text", "discard"), [("yes", True), ("off", False)])
def test_discard_is_enabled_or_disabled(text: str, discard: bool) -> None:
    assert parse_config(["--image=/x", f"--discard-disk={text}"]).discard_disk is discard
    with pytest.raises(UsageError, match="--discard-disk=maybe is neither yes nor no"):
        parse_config(["--image=/x", "--discard-disk=maybe"])


#: Values that users should not write, but that scripts do.
ODD_VALUES = (
    *("", " ", "x", "-1", "0", "nan", "inf", "1e400", "9" * 24, "yes", "é", "\udcff", "%", "\\", "~", "--"),
    *(":", "=", ",", "/", "a:b", "a=b", "a,b=c", "a:b:c:d", "size=1", "/proc/nonexistent/x", "/dev/null"),
)


@pytest.mark.parametrize(
    "option",
    [each.option_strings[-1] for each in build_parser()._actions if each.option_strings and each.nargs != 0],
)
def test_every_option_accepts_a_value_or_reports_the_error(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    base = () if option in ("--image", "--guest", "--directory", "--linux") else ("--guest=builtin",)
    for value in ODD_VALUES:
        said = refusal([*base, f"{option}={value}"], capsys)
        assert said is None or len(said.splitlines()) == 1


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str | None:
    """Return the error for these arguments, or None if they are accepted."""
    try:
        options = build_parser().parse_args(arguments)
        unsupported_options.check(options)
        configure(options)
    except VmspawnError as error:
        return f"{error}{error.hint}"
    except SystemExit as ended:
        return capsys.readouterr().err.splitlines()[0] if ended.code == 2 else ""
    return None
