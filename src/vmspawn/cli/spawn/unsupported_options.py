# SPDX-License-Identifier: LGPL-2.1-or-later
"""Options of systemd-vmspawn that mean something we cannot do yet.

What they are set to by default, or where it does not matter, is accepted; a firm wish is refused, for a script must not
believe that it has what it has not.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import NamedTuple

from ...errors import UsageError
from ..parser import boolean


class _Later(NamedTuple):
    """One option: what its values look like, what it would give, and which values go without that."""

    name: str
    metavar: str
    what: str
    without: tuple[str, ...] = ("no", "auto")


_BOOLEANS = (
    _Later("--vsock", "BOOL|auto", "a VSOCK device"),
    _Later("--tpm", "BOOL|auto", "a TPM"),
    _Later("--pass-ssh-key", "BOOL", "an SSH key for the guest", ("no",)),
    _Later("--notify-ready", "BOOL", "waiting for the guest's READY=1", ("no",)),
    _Later("--bind-user-shell", "BOOL|PATH", "users of the host in the guest", ("no",)),
)

_VALUES = (
    _Later("--vsock-cid", "CID", "a VSOCK device", ()),
    _Later("--tpm-state", "off|auto|PATH", "a TPM", ("off", "auto")),
    _Later("--coco", "no|sev-snp|tdx", "a confidential machine", ("no",)),
    _Later("--private-users", "UIDBASE[:NUIDS]", "mapped users for --directory=", ()),
    _Later("--bind-user", "NAME", "users of the host in the guest", ()),
    _Later("--bind-user-group", "GROUP", "users of the host in the guest", ()),
    _Later("--forward-journal", "FILE|DIR", "the guest's journal on the host", ()),
    _Later("--forward-journal-max-use", "BYTES", "the guest's journal on the host", ()),
    _Later("--forward-journal-keep-free", "BYTES", "the guest's journal on the host", ()),
    _Later("--forward-journal-max-file-size", "BYTES", "the guest's journal on the host", ()),
    _Later("--forward-journal-max-files", "N", "the guest's journal on the host", ()),
    _Later("--background", "COLOR", "a tinted terminal", ("",)),
    _Later("--ssh-key-type", "TYPE", "an SSH key for the guest", ()),
)


def add(parser: argparse.ArgumentParser) -> None:
    """Add the options to the command's parser."""
    group = parser.add_argument_group(
        "Not supported yet", "What goes without is accepted, such as no and auto; a firm wish is refused."
    )
    for each in (*_BOOLEANS, *_VALUES):
        help_text = f"{each.what}: not supported yet"
        group.add_argument(each.name, metavar=each.metavar, dest=_destination(each), help=help_text)
    group.add_argument("-n", "--network-tap", action="store_true", help="a TAP device: not supported yet")
    for name in ("--no-pager", "--no-ask-password"):
        parser.add_argument(name, action="store_true", help=argparse.SUPPRESS)


def _destination(option: _Later) -> str:
    return "later_" + option.name.lstrip("-").replace("-", "_")


def check(options: argparse.Namespace) -> list[str]:
    """What the machine goes without because it was only said that it may have it. Raises UsageError for a firm wish."""
    if options.network_tap:
        raise UsageError("--network-tap is not supported yet", hint="use --network-user-mode")
    return [*_check(options, _BOOLEANS, booleans=True), *_check(options, _VALUES, booleans=False)]


def _check(options: argparse.Namespace, table: tuple[_Later, ...], *, booleans: bool) -> Iterator[str]:
    for each in table:
        text = getattr(options, _destination(each))
        if text is None:
            continue
        named = "PATH" in each.metavar and text.startswith("/")
        value = boolean(f"{each.name}=", text, auto="auto" in each.without) if booleans and not named else text
        if value not in each.without:
            choices = " or ".join(f"{each.name}={choice}" for choice in each.without)
            hint = f"use {choices}" if choices else f"leave out {each.name}="
            raise UsageError(f"{each.name}={text}: {each.what} is not supported yet", hint=hint)
        if value == "auto" and booleans:
            yield f"{each.name}=auto: {each.what} is not supported yet, so the machine goes without"
