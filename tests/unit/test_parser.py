# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests both commands' arguments: options at any place, unknown options, and the help."""

import argparse
from collections.abc import Iterator

import pytest

import vmspawn.cli.ctl.main as vmctl
import vmspawn.cli.spawn.main as vmspawn_command
from tests.spawn_config import parse_config
from vmspawn.cli.parser import Parser, _options, _verbs

#: The verbs without the hidden ones, which completion scripts call.
VERBS = {name: verb for name, verb in _verbs(vmctl.build_parser()).items() if not name.startswith("_")}


def value_of(action: argparse.Action) -> str:
    return str(next(iter(action.choices))) if action.choices else "1"


def words(parser: argparse.ArgumentParser) -> list[str]:
    """Return one argument for each positional of a verb."""
    positionals = [each for each in parser._actions if not each.option_strings]
    return [f"{each.dest}{number}:a=b" for number, each in enumerate(positionals)]


@pytest.mark.parametrize("verb", VERBS)
def test_the_help_of_a_verb_fits_80_columns_and_its_usage_names_all_arguments(
    verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    parser = VERBS[verb]
    assert [line for line in parser.format_help().splitlines() if len(line) > 80] == []
    metavars = [str(each.metavar) for each in parser._actions if not each.option_strings]
    assert [each for each in metavars if each not in (parser.usage or "")] == []


def forms(action: argparse.Action) -> Iterator[list[str]]:
    """Yield all forms of an option."""
    for name in action.option_strings:
        if action.nargs == 0:
            yield [name]
        else:
            yield [name, value_of(action)]
            yield [f"{name}={value_of(action)}" if name.startswith("--") else f"{name}{value_of(action)}"]


@pytest.mark.parametrize("verb", VERBS)
def test_an_option_may_stand_anywhere(verb: str) -> None:
    parser, positionals = VERBS[verb], words(VERBS[verb])
    assert isinstance(parser, Parser)
    end = len(positionals) if parser.options_end_after is None else parser.options_end_after - 1
    for action in parser._actions:
        if not action.option_strings or action.dest == "help":
            continue
        for option in forms(action):
            first = vmctl.build_parser().parse_args([verb, *option, *positionals])
            for at in range(end + 1):
                arguments = [verb, *positionals[:at], *option, *positionals[at:]]
                assert vmctl.build_parser().parse_args(arguments) == first, arguments


@pytest.mark.parametrize("verb", VERBS)
def test_an_option_without_its_value_takes_no_argument(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The words before the option are the verb's arguments."""
    parser, positionals = VERBS[verb], words(VERBS[verb])
    assert isinstance(parser, Parser)
    if parser.options_end_after is not None:
        del positionals[parser.options_end_after - 1 :]
    for action in parser._actions:
        for name in action.option_strings if action.nargs != 0 else ():
            for arguments in ([*positionals, name], [name, "--", *positionals]):
                with pytest.raises(SystemExit):
                    parser.parse_args(arguments)
                assert "expected one argument" in capsys.readouterr().err, arguments


@pytest.mark.parametrize("verb", VERBS)
def test_everything_after_two_dashes_is_an_argument(verb: str) -> None:
    positionals = ["-odd", "--", "--odd=1 2", "-"][: len(words(VERBS[verb]))]
    found = vars(VERBS[verb].parse_args(["--", *positionals]))
    names = [each.dest for each in VERBS[verb]._actions if not each.option_strings]
    plain = [each for name in names for each in (found[name] if isinstance(found[name], list) else [found[name]])]
    assert plain == positionals


def test_options_end_at_the_arguments_of_a_command() -> None:
    found = vmctl.build_parser().parse_args(["qmp", "a", "--read-only", "b", "x=1", "--read-only", "--", "-q"])
    assert (found.read_only, found.quiet, found.arguments) == (True, False, ["x=1", "--read-only", "--", "-q"])
    arguments = ["--guest=builtin", "-q", "ro", "--quiet", "--nosuch=1", "--"]
    assert vmspawn_command.build_parser().parse_args(arguments).quiet
    assert parse_config(arguments).kernel_arguments == ("ro", "--quiet", "--nosuch=1", "--")
    assert parse_config(["--guest=builtin", "--", "--verbose"]).kernel_arguments == ("--verbose",)


def test_the_options_of_a_verb_that_runs_a_command_end_at_the_command() -> None:
    parser = Parser(prog="x")
    parser.add_argument("--user")
    parser.add_argument("machine")
    parser.add_argument("command")
    parser.end_options_here()
    parser.add_argument("arguments", nargs="*")
    found = parser.parse_args(["a", "--user", "me", "ls", "--user", "you", "-l"])
    assert (found.machine, found.user, found.command, found.arguments) == ("a", "me", "ls", ["--user", "you", "-l"])


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (["list", "--stats"], "unknown option --stats", "it is an option of: list-disks"),
        (["list-disks", "a", "--stat"], "unknown option --stat", "did you mean --stats?"),
        (["--bus=nvme", "attach-disk", "a", "b"], "unknown option --bus", "it is an option of: attach-disk"),
        (["status", "a", "--nosuch=a b"], "unknown option --nosuch", "see: vmctl status --help"),
        (["status", "a", "-xo such"], "unknown option -x", "see: vmctl status --help"),
        (["status", "a", "-5"], "unknown option -5", "see: vmctl status --help"),
        (["status", "a", "b"], "unexpected argument: b", "see: vmctl status --help"),
        (["sttus", "a"], "there is no verb sttus", "did you mean status?"),
        (["help", "dance"], "there is no verb dance", "see: vmctl --help"),
        (["exec", "a"], "the following arguments are required: COMMAND", "see: vmctl exec --help"),
        (["attach-disk", "a", "--bus", "--quiet"], "argument --bus: expected one argument", "attach-disk --help"),
        (["attach-disk", "a", "b", "--read-only=no"], "--read-only takes no value", "see: vmctl attach-disk --help"),
    ],
)
def test_a_mistake_gets_a_line_and_a_hint(
    arguments: list[str], message: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        options = vmctl.build_parser().parse_args(arguments)
        options.action(options)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert lines[0] == f"vmctl: {message}"
    assert hint in lines[1]


@pytest.mark.parametrize("argument", ["--nosuch=a b", "-Z a b", "--no such"])
def test_an_unknown_option_is_never_a_kernel_argument(argument: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        parse_config(["--guest=builtin", argument])
    assert capsys.readouterr().err.startswith("vmspawn: unknown option -")


@pytest.mark.parametrize("verb", VERBS)
def test_no_option_can_be_abbreviated(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    names = set(_options(VERBS[verb]))
    for name in names:
        if name[:-1] in names or not name.startswith("--"):
            continue
        with pytest.raises(SystemExit, match="2"):
            VERBS[verb].parse_args([name[:-1], *words(VERBS[verb])])
        assert f"did you mean {name}?" in capsys.readouterr().err


def test_a_value_that_begins_with_a_dash_follows_an_equals_sign_or_contains_a_space() -> None:
    for arguments in (["--qemu-arg=-x"], ["--qemu-arg=-x y"], ["--qemu-arg", "-x y"]):
        config = parse_config(["--guest=builtin", *arguments])
        assert config.qemu_arguments[0].startswith("-x")


def test_short_options_can_be_joined() -> None:
    arguments = ["-qxM", "name", "-i/image"]
    config = parse_config(arguments)
    assert vmspawn_command.build_parser().parse_args(arguments).quiet
    assert (config.ephemeral, config.name, config.image) == (True, "name", "/image")


def test_help_has_each_verb_once_under_a_heading(capsys: pytest.CaptureFixture[str]) -> None:
    shown = []
    for arguments in (["--help"], ["help"]):
        with pytest.raises(SystemExit, match="0"):
            options = vmctl.build_parser().parse_args(arguments)
            options.action(options)
            raise SystemExit(0)
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1]
    lines = shown[0].splitlines()
    listed = [line.split()[0] for line in lines if line.startswith("  ") and line[2] not in " -"]
    assert listed == list(VERBS)
    for heading in ("Machines:", "Console:", "Disks:", "QMP:", "Help:", "Options:"):
        assert heading in lines


def test_help_with_a_verb_shows_the_help_of_the_verb(capsys: pytest.CaptureFixture[str]) -> None:
    options = vmctl.build_parser().parse_args(["help", "attach-disk"])
    with pytest.raises(SystemExit, match="0"):
        options.action(options)
    assert capsys.readouterr().out.startswith("usage: vmctl attach-disk MACHINE [PATH] [OPTION…]")


@pytest.mark.parametrize(
    ("verb", "usage"),
    [
        ("exec", "MACHINE [OPTION…] [--] COMMAND [ARGUMENT…]"),
        ("shell", "[USER@]MACHINE [OPTION…] [COMMAND [ARGUMENT…]]"),
        ("ssh", "[USER@]MACHINE [OPTION…] [COMMAND…]"),
        ("qmp", "MACHINE [OPTION…] [COMMAND [ARGUMENT…]]"),
    ],
)
def test_the_usage_shows_where_options_end(verb: str, usage: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        vmctl.build_parser().parse_args([verb, "--help"])
    assert capsys.readouterr().out.splitlines()[0] == f"usage: vmctl {verb} {usage}"


@pytest.mark.parametrize(
    "words", [["-t", "web", "ls", "-l"], ["web", "-t", "ls", "-l"], ["web", "-t", "--", "ls", "-l"]]
)
def test_options_of_ssh_end_at_its_command(words: list[str]) -> None:
    options = vmctl.build_parser().parse_args(["ssh", *words])
    assert (options.machine, options.tty, options.command) == ("web", True, ["ls", "-l"])


def test_the_help_of_verbs_that_wait_has_the_default_timeout() -> None:
    assert "time to wait for the conditions (default: 120)" in VERBS["wait"].format_help().replace("\n" + " " * 26, " ")
    assert "time to wait for an answer" in VERBS["list-forwards"].format_help()


def test_help_omits_unsupported_options() -> None:
    text = vmspawn_command.build_parser().format_help()
    assert "--tpm" not in text
    assert "vmspawn(1) lists the options" in text


def test_help_breaks_no_option_or_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for name, parser in VERBS.items():
        lines = parser.format_help().splitlines()
        assert not [line for line in lines if line.endswith("-")], name
        assert max(map(len, lines[1:])) <= 80, name
