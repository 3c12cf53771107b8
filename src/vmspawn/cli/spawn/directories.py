# SPDX-License-Identifier: LGPL-2.1-or-later
"""Defines the options that share directories of the host with the guest."""

import argparse
import os
import re
from typing import Any, TypedDict

from ...boot.shares import Share
from ...errors import UsageError


class Directories(TypedDict):
    """Fields of MachineConfig."""

    directory: str | None
    directory_rw: bool
    binds: tuple[Share, ...]


class _Bind(argparse.Action):
    """Collects --bind= and --bind-ro= in the order of the command line."""

    def __call__(self, parser: object, namespace: argparse.Namespace, values: Any, option: str | None = None) -> None:
        namespace.binds = [*namespace.binds, (option, values)]


def add(parser: argparse.ArgumentParser) -> None:
    """Add the options to the command's parser."""
    group = parser.add_argument_group("Directories")
    group.add_argument("-D", "--directory", metavar="PATH", help="boot a directory of the host as the guest's root")
    group.add_argument(
        "--directory-rw", action="store_true", help="with --guest=builtin, let the guest write to that directory"
    )
    for name, text in (("--bind", "share a directory of the host"), ("--bind-ro", "share a directory read-only")):
        group.add_argument(
            name, metavar="SOURCE[:TARGET]", action=_Bind, dest="binds", default=[], help=f"{text}; repeatable"
        )


def read(options: argparse.Namespace) -> Directories:
    """Read the options. Raises UsageError."""
    binds: list[Share] = []
    for option, text in options.binds:
        share = parse_share(f"{option}=", text, read_only=option == "--bind-ro")
        if any(share.target == other.target for other in binds):
            raise UsageError(f"{option}={text}: {share.target} is bound already", hint="choose another target")
        binds.append(share)
    directory = os.path.abspath(options.directory) if options.directory else None
    return {"directory": directory, "directory_rw": options.directory_rw, "binds": tuple(binds)}


def parse_share(option: str, text: str, *, read_only: bool) -> Share:
    """Parse `SOURCE[:TARGET]`, in which a backslash escapes a colon or a backslash. Raises UsageError."""
    parts = [re.sub(r"\\(.)", r"\1", each) for each in re.findall(r"(?:[^:\\]|\\.)+", text, re.DOTALL)]
    if not 1 <= len(parts) <= 2 or len(re.findall(r"(?<!\\):", text)) != len(parts) - 1 or text.endswith("\\"):
        raise UsageError(f"{option}{text} is not SOURCE[:TARGET]", hint=r"write \: for a colon in a path")
    source = os.path.abspath(parts[0])
    target = parts[1] if len(parts) == 2 else source
    if not os.path.isabs(target):
        raise UsageError(f"{option}{text}: the guest's path is not absolute", hint=f"write {option}SOURCE:/TARGET")
    target = os.path.normpath(target)
    if not target.strip("/"):
        raise UsageError(f"{option}{text} would hide the guest's root", hint="use --directory= for that")
    return Share(source, target, read_only)
